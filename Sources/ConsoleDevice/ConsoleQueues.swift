import BackendKit
import Glibc
import VirtioQueue
import VirtioSpec

/// The transmit queue: the guest's output. A chain the port cannot take whole is held, and the rest follows when there is
/// room again.
final class OutputQueue {
  enum End { case empty, held, turnOver, stopped }

  /// Bytes of one turn: a guest may put 4 GiB into one chain.
  static let turn = 256 << 10

  private var queue: DeviceQueue?
  private var chain: DescriptorChain?
  /// `chain` is a chain of the ring's that is not done.
  private var isHolding = false

  /// The driver has sent something since the queue was started.
  private(set) var hasServed = false

  var isHere: Bool { queue != nil }

  func start(_ queue: consuming DeviceQueue) {
    chain = DescriptorChain(for: queue.ring)
    self.queue = consume queue
    isHolding = false
    hasServed = false
  }

  /// Gives the queue back; what is held goes to the port as far as it fits.
  func stop(_ port: ConsolePort) -> DeviceQueue? {
    guard var queue = queue.take() else { return nil }
    if isHolding, var chain = chain.take() {
      isHolding = false
      // Of more than the port can keep only the end would stay anyway.
      chain.dropReadable(chain.readableByteCount - ConsolePort.outputByteCount)
      // Bounded: every round takes a whole piece.
      while chain.readableByteCount > 0 {
        let piece = unsafe chain.readable[0]
        // SAFETY: the piece is guest memory lent by the queue, and is read once.
        unsafe port.writeOrDrop(UnsafeRawBufferPointer(start: piece.iov_base, count: piece.iov_len))
        unsafe chain.dropReadable(piece.iov_len)
      }
      queue.ring.complete(chain.token, written: 0)
      if queue.ring.publish() { queue.call() }
    }
    chain = nil
    return queue
  }

  func drain(to port: ConsolePort) -> End {
    guard var queue = queue.take() else { return .stopped }
    guard var chain = chain.take() else {
      self.queue = consume queue
      return .stopped
    }
    let end = drain(&queue, &chain, port)
    self.queue = consume queue
    self.chain = consume chain
    return end
  }

  private func drain(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ port: ConsolePort) -> End {
    var left = Self.turn
    var requests = 0
    defer {
      queue.counters.requests.add(UInt64(requests))
      queue.counters.bytesRead.add(UInt64(Self.turn - left))
    }
    repeat {
      queue.ring.disableKicks()
      // Bounded by the turn: a chain costs at least 64 bytes of it, and each piece its length.
      while left > 0 {
        if !isHolding {
          switch queue.ring.next(&chain) {
          case .chain:
            isHolding = true
            hasServed = true
          case .empty: break
          case .broken(let reason):
            queue.markBroken(reason)
            return .stopped
          }
          if !isHolding { break }
          left -= min(64, left)
        }
        while chain.readableByteCount > 0, left > 0 {
          let piece = unsafe chain.readable[0]
          let count = unsafe min(piece.iov_len, left)
          // SAFETY: the piece is guest memory lent by the queue, and is read once.
          let taken = unsafe port.write(UnsafeRawBufferPointer(start: piece.iov_base, count: count))
          chain.dropReadable(taken)
          left -= taken
          if taken < count {
            if queue.ring.publish() { queue.call() }
            return .held
          }
        }
        if chain.readableByteCount == 0 {
          isHolding = false
          queue.ring.complete(chain.token, written: 0)
          requests += 1
        }
      }
      if queue.ring.publish() { queue.call() }
      if left == 0 { return .turnOver }
    } while queue.ring.enableKicks()
    return .empty
  }
}

/// The receive queue: input for the guest.
final class InputQueue {
  private var queue: DeviceQueue?
  private var chain: DescriptorChain?

  func start(_ queue: consuming DeviceQueue) {
    chain = DescriptorChain(for: queue.ring)
    self.queue = consume queue
  }

  func stop() -> DeviceQueue? {
    chain = nil
    return queue.take()
  }

  /// Moves input into the driver's buffers, as far as both reach.
  func fill(from port: ConsolePort) {
    guard var queue = queue.take() else { return }
    guard var chain = chain.take() else {
      self.queue = consume queue
      return
    }
    fill(&queue, &chain, port)
    self.queue = consume queue
    self.chain = consume chain
  }

  private func fill(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ port: ConsolePort) {
    // Kicks are of use only while input waits for buffers.
    queue.ring.disableKicks()
    // Bounded by the input, and by the ring where the driver's buffers have no room at all.
    var rounds = Int(queue.ring.configuration.size)
    while port.inputCount > 0, rounds > 0 {
      switch queue.ring.next(&chain) {
      case .chain: break
      case .empty:
        if queue.ring.enableKicks() {
          queue.ring.disableKicks()
          continue
        }
        if queue.ring.publish() { queue.call() }
        return
      case .broken(let reason): return queue.markBroken(reason)
      }
      rounds -= 1
      var written = 0
      // At most two pieces, as the port's buffer wraps once.
      for _ in 0..<2 where chain.writableByteCount > 0 && port.inputCount > 0 {
        unsafe port.withInput { bytes in
          let count = unsafe chain.put(bytes)
          written += count
          return count
        }
      }
      queue.ring.complete(chain.token, written: UInt32(written))
      queue.counters.requests.add(1)
      queue.counters.bytesWritten.add(UInt64(written))
    }
    if queue.ring.publish() { queue.call() }
  }
}
