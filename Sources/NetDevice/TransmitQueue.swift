import BackendKit
import Glibc
import HostSystem
import VirtioQueue
import VirtioSpec

/// A transmit queue: frames from the driver's chains to the port, without a copy but for the header.
@safe
package final class TransmitQueue {
  /// Why a drain ended.
  package enum End: Equatable, Sendable {
    /// The ring is empty, and the driver kicks when it is not.
    case empty
    /// The port takes no more now; go on when it is writable.
    case blocked
    /// Others want their turn; go on soon.
    case turnOver
    /// The ring is broken, or the queue is not here.
    case stopped
  }

  /// Frames of one turn, and frames between two looks of the driver's at the used ring.
  static let turn = 256
  static let batch = 64
  /// `IOV_MAX`, less the one for the header.
  static let mostPieces = 1023

  private var queue: DeviceQueue?
  private var chain: DescriptorChain?
  private let parts: UnsafeMutablePointer<iovec>
  /// The checked header, and behind it the inspected start of a frame with segmentation.
  private let front: UnsafeMutableRawPointer
  package var counters = NetCounters()

  package init() {
    unsafe parts = .allocate(capacity: Self.mostPieces + 1)
    unsafe parts.initialize(repeating: iovec(), count: Self.mostPieces + 1)
    unsafe front = .allocate(byteCount: NetHeader.byteCount + TransmitHeader.greatestHeaders, alignment: 8)
  }

  deinit {
    unsafe parts.deallocate()
    unsafe front.deallocate()
  }

  package var isHere: Bool { queue != nil }

  package func start(_ queue: consuming DeviceQueue) {
    chain = DescriptorChain(for: queue.ring)
    self.queue = consume queue
  }

  package func stop() -> DeviceQueue? {
    chain = nil
    return queue.take()
  }

  /// Sends what the driver has made available.
  /// - Parameter port: nil drops the frames: the link is down, or the queue is disabled.
  package func drain(to port: PacketPort?, _ offloads: TransmitOffloads) -> End {
    // The queue leaves its place for the turn, so that nothing on the way looks at it through this object.
    guard var queue = queue.take() else { return .stopped }
    guard var chain = chain.take() else {
      self.queue = consume queue
      return .stopped
    }
    let end = drain(&queue, &chain, port, offloads)
    self.queue = consume queue
    self.chain = consume chain
    return end
  }

  private func drain(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ port: PacketPort?, _ offloads: TransmitOffloads) -> End {
    var left = Self.turn
    var unpublished = 0
    var bytes = 0
    defer {
      queue.counters.requests.add(UInt64(Self.turn - left))
      queue.counters.bytesRead.add(UInt64(bytes))
    }
    repeat {
      queue.ring.disableKicks()
      // Bounded by the turn.
      drain: while left > 0 {
        switch queue.ring.next(&chain) {
        case .empty: break drain
        case .broken(let reason):
          queue.markBroken(reason)
          return .stopped
        case .chain: break
        }
        let count = chain.readableByteCount
        guard send(&chain, port, offloads) else {
          queue.ring.giveBack(chain.token)
          if queue.ring.publish() { queue.call() }
          return .blocked
        }
        bytes &+= count
        left -= 1
        queue.ring.complete(chain.token, written: 0)
        unpublished += 1
        if unpublished == Self.batch {
          unpublished = 0
          if queue.ring.publish() { queue.call() }
        }
      }
      if queue.ring.publish() { queue.call() }
      unpublished = 0
      if left == 0 { return .turnOver }
    } while queue.ring.enableKicks()
    return .empty
  }

  /// Sends one chain; false when the port takes nothing now. Everything else is an outcome that ends the chain.
  private func send(_ chain: inout DescriptorChain, _ port: PacketPort?, _ offloads: TransmitOffloads) -> Bool {
    guard !chain.isPoisoned, let header = chain.takeReadable(NetHeader.self) else {
      counters.refused &+= 1
      return true
    }
    let frameByteCount = chain.readableByteCount
    let inspected = TransmitHeader.inspectedByteCount(header, frameByteCount: frameByteCount)
    // SAFETY: `front` has room for the header and `greatestHeaders` bytes, and `inspected` is at most that.
    let start = unsafe UnsafeMutableRawBufferPointer(start: front + NetHeader.byteCount, count: inspected)
    if inspected > 0 { unsafe chain.takeReadable(into: start) }
    let verdict = unsafe TransmitHeader.check(
      header, frameByteCount: frameByteCount, start: UnsafeRawBufferPointer(start), offloads: offloads)
    guard case .success(let checked) = verdict else {
      counters.refused &+= 1
      return true
    }
    guard let port else {
      counters.notSent &+= 1
      return true
    }
    let pieces = unsafe chain.readable
    guard pieces.count <= Self.mostPieces else {
      counters.refused &+= 1
      return true
    }
    // SAFETY: `front` is 8-byte aligned and has room; `parts` has room for mostPieces + 1.
    unsafe front.storeBytes(of: checked.header, as: NetHeader.self)
    unsafe parts[0] = unsafe iovec(iov_base: front, iov_len: NetHeader.byteCount + inspected)
    if let source = pieces.baseAddress { unsafe (parts + 1).update(from: source, count: pieces.count) }
    switch unsafe port.send(UnsafeMutableBufferPointer(start: parts, count: pieces.count + 1)) {
    case .sent: counters.transmitted &+= 1
    case .wouldBlock: return false
    case .refused, .gone: counters.notSent &+= 1
    }
    return true
  }
}
