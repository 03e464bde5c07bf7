import Glibc

/// A lock with a condition to wait on.
@safe
final class Gate: @unchecked Sendable {
  // @unchecked: both objects are made for use from any thread, and live at fixed addresses until deinit.
  private let mutex = UnsafeMutablePointer<pthread_mutex_t>.allocate(capacity: 1)
  private let condition = UnsafeMutablePointer<pthread_cond_t>.allocate(capacity: 1)

  init() {
    // SAFETY: freshly allocated, initialized exactly once.
    unsafe mutex.initialize(to: pthread_mutex_t())
    unsafe condition.initialize(to: pthread_cond_t())
    unsafe pthread_mutex_init(mutex, nil)
    unsafe pthread_cond_init(condition, nil)
  }

  deinit {
    // SAFETY: nobody holds or waits for a gate that has no owner left.
    unsafe pthread_mutex_destroy(mutex)
    unsafe pthread_cond_destroy(condition)
    unsafe mutex.deallocate()
    unsafe condition.deallocate()
  }

  @inline(__always)
  func withLock<Value, Failure: Error>(_ body: () throws(Failure) -> Value) throws(Failure) -> Value {
    // SAFETY: initialized in init.
    unsafe pthread_mutex_lock(mutex)
    defer { _ = unsafe pthread_mutex_unlock(mutex) }
    return try body()
  }

  /// Waits until `condition` is true; it is looked at under the lock, again after every `wakeAll`. Call inside `withLock`.
  func wait(until isMet: () -> Bool) {
    while !isMet() {
      // SAFETY: the caller holds the mutex.
      unsafe pthread_cond_wait(condition, mutex)
    }
  }

  func wakeAll() {
    // SAFETY: initialized in init.
    unsafe pthread_cond_broadcast(condition)
  }
}
