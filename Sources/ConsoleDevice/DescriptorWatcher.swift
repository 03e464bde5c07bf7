import BackendKit
import HostSystem

/// Whoever waits for a port's descriptors: the kit's loop for a virtio console, a loop of its own for the serial carrier.
package protocol DescriptorWatcher: ~Copyable {
  mutating func watch(_ fd: borrowing OwnedFD, for readiness: Readiness, token: Int) throws(SystemError)
  mutating func rewatch(_ fd: borrowing OwnedFD, for readiness: Readiness) throws(SystemError)
  mutating func unwatch(_ fd: borrowing OwnedFD)
}

extension BackendContext: DescriptorWatcher {}

/// An event loop as a watcher.
package struct LoopWatcher: ~Copyable, DescriptorWatcher {
  package var loop: EventLoop<Int>

  package init() throws(SystemError) { loop = try EventLoop<Int>() }

  package mutating func watch(_ fd: borrowing OwnedFD, for readiness: Readiness, token: Int) throws(SystemError) {
    try loop.add(fd, for: readiness, token: token)
  }
  package mutating func rewatch(_ fd: borrowing OwnedFD, for readiness: Readiness) throws(SystemError) {
    try loop.modify(fd, for: readiness)
  }
  package mutating func unwatch(_ fd: borrowing OwnedFD) { loop.remove(fd) }
}

/// One descriptor's standing with the watcher.
struct Watch {
  private var current: Readiness?

  /// Makes the registration what it should be; nil means none at all, because a hang-up is reported whether asked for or
  /// not and would keep the loop turning. False when the descriptor cannot be watched (a regular file).
  @discardableResult
  mutating func set<W: DescriptorWatcher & ~Copyable>(
    _ wanted: Readiness?, _ fd: borrowing OwnedFD, token: Int, _ watcher: inout W
  ) -> Bool {
    guard wanted != current else { return true }
    do {
      switch (current, wanted) {
      case (_, nil): watcher.unwatch(fd)
      case (nil, let readiness?): try watcher.watch(fd, for: readiness, token: token)
      case (_?, let readiness?): try watcher.rewatch(fd, for: readiness)
      }
    } catch { return false }
    current = wanted
    return true
  }

  /// As above, where there is a descriptor.
  @discardableResult
  mutating func set<W: DescriptorWatcher & ~Copyable>(
    _ wanted: Readiness?, optional fd: borrowing OwnedFD?, token: Int, _ watcher: inout W
  ) -> Bool {
    switch fd {
    case .some(let fd): set(wanted, fd, token: token, &watcher)
    case .none: wanted == nil
    }
  }
}
