import BackendKit
import Glibc
import HostSystem
import VirtioQueue
import VirtioSpec

/// A receive queue: frames from the port straight into the driver's buffers.
///
/// Several chains are kept at hand in a window, enough for the frames seen lately; a longer frame spills over into private
/// memory and is copied from there into further chains. A frame for which the driver has too few buffers waits in private
/// memory and every chain goes back to the ring untouched. Between two turns the window is empty.
@safe
package final class ReceiveQueue {
  package enum End: Equatable, Sendable {
    /// The port has nothing more; go on when it is readable.
    case drained
    /// The driver's buffers are used up; it kicks when there are more. The port is not to be read until then.
    case starved
    /// Others want their turn; the port is still readable.
    case turnOver
    /// There is no port any more.
    case portGone
    /// The ring is broken, or the queue is not here.
    case stopped
  }

  static let turn = 256
  static let batch = 64
  /// Header and the longest frame.
  static let greatestPacket = NetHeader.byteCount + TransmitHeader.greatestFrame
  /// Room wanted in the window before anything is known: header, Ethernet with a VLAN tag, 1500 bytes.
  static let ordinaryPacket = NetHeader.byteCount + 18 + 1500

  private var queue: DeviceQueue?
  private var chain: DescriptorChain?
  private var window = ReceiveWindow()
  private let parts: UnsafeMutablePointer<iovec>
  /// The header as it came.
  private let front: UnsafeMutableRawPointer
  /// Where a packet goes that is longer than the window; after a starvation the packet that waits. Pages are only used when touched.
  private let spill: UnsafeMutableRawPointer
  /// Bytes of the packet that waits in `spill`, header included.
  private var waiting = 0
  private var wanted = ordinaryPacket
  private var longestLately = 0
  private var framesSinceAdjustment = 0
  package var counters = NetCounters()
  /// The driver can take a frame in several buffers.
  package var isMergeable = false

  package init() {
    unsafe parts = .allocate(capacity: ReceiveWindow.mostPieces + 2)
    unsafe parts.initialize(repeating: iovec(), count: ReceiveWindow.mostPieces + 2)
    unsafe front = .allocate(byteCount: NetHeader.byteCount, alignment: 8)
    unsafe spill = .allocate(byteCount: Self.greatestPacket, alignment: 16)
  }

  deinit {
    unsafe parts.deallocate()
    unsafe front.deallocate()
    unsafe spill.deallocate()
  }

  package var isHere: Bool { queue != nil }

  package func start(_ queue: consuming DeviceQueue) {
    chain = DescriptorChain(for: queue.ring)
    self.queue = consume queue
    wanted = Self.ordinaryPacket
  }

  package func stop() -> DeviceQueue? {
    chain = nil
    // The guest that waited for this packet is gone or starts afresh.
    waiting = 0
    return queue.take()
  }

  /// Receives what the port has, as far as the driver's buffers reach.
  package func fill(from port: PacketPort, _ offloads: ReceiveOffloads) -> End {
    guard var queue = queue.take() else { return .stopped }
    guard var chain = chain.take() else {
      self.queue = consume queue
      return .stopped
    }
    let end = fill(&queue, &chain, port, offloads)
    self.queue = consume queue
    self.chain = consume chain
    return end
  }

  private func fill(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ port: PacketPort, _ offloads: ReceiveOffloads) -> End {
    let before = counters.received
    defer { queue.counters.requests.add(counters.received &- before) }
    var unpublished = 0
    // Kicks are of use only to somebody who waits for buffers; `gather` asks for them then.
    queue.ring.disableKicks()
    // Bounded by the turn: every round that does not end it counts.
    for _ in 0..<Self.turn {
      switch step(&queue, &chain, port, offloads) {
      case .next: unpublished += 1
      case .end(let end):
        giveBack(&queue)
        if queue.ring.publish() { queue.call() }
        return end
      }
      if unpublished == Self.batch {
        unpublished = 0
        if queue.ring.publish() { queue.call() }
      }
    }
    giveBack(&queue)
    if queue.ring.publish() { queue.call() }
    return .turnOver
  }

  private enum Step {
    case next
    case end(End)
  }

  /// One packet from the port, or the one that waits.
  private func step(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ port: PacketPort, _ offloads: ReceiveOffloads) -> Step {
    if waiting > 0 { return deliverWaiting(&queue, &chain, offloads) }
    switch gather(isMergeable ? wanted : 1, &queue, &chain) {
    case .broken: return .end(.stopped)
    case .enough, .blocked: break
    case .starved: if window.isEmpty { return starve() }
    }
    let room = window.byteCount
    // SAFETY: `front` and `spill` are private and as long as said; `parts` has room for the window's pieces and two more.
    unsafe parts[0] = unsafe iovec(iov_base: front, iov_len: NetHeader.byteCount)
    let count = unsafe window.list(skipping: NetHeader.byteCount, in: parts + 1)
    unsafe parts[count + 1] = unsafe iovec(iov_base: spill, iov_len: Self.greatestPacket)
    let length: Int
    switch unsafe port.receive(UnsafeMutableBufferPointer(start: parts, count: count + 2)) {
    case .packet(let bytes): length = bytes
    case .empty: return .end(.drained)
    case .gone: return .end(.portGone)
    }
    guard length >= NetHeader.byteCount + TransmitHeader.ethernetByteCount else {
      counters.unsuitable &+= 1
      return .next
    }
    // SAFETY: `front` is aligned and holds a header, as the packet is at least that long.
    let header = unsafe front.load(as: NetHeader.self)
    guard length > room else {
      return deliver(header, length, &queue, offloads)
    }
    guard isMergeable, length <= Self.greatestPacket else {
      counters.tooLong &+= 1
      return .next
    }
    wanted = max(wanted, length)
    switch gather(length, &queue, &chain) {
    case .broken: return .end(.stopped)
    case .blocked:
      counters.tooLong &+= 1
      return .next
    case .enough:
      // SAFETY: the packet's end, `length - room` bytes, is at the start of `spill`.
      unsafe window.copyIn(UnsafeRawBufferPointer(start: spill, count: length - room), at: room)
      return deliver(header, length, &queue, offloads)
    case .starved:
      // The whole packet into `spill`: its end behind its beginning, which comes back from the driver's buffers.
      // SAFETY: `length` is at most the size of `spill`; the move allows overlap.
      unsafe (spill + room).copyMemory(from: spill, byteCount: length - room)
      unsafe window.copyOut(
        UnsafeMutableRawBufferPointer(start: spill + NetHeader.byteCount, count: room - NetHeader.byteCount),
        from: NetHeader.byteCount)
      unsafe spill.storeBytes(of: header, as: NetHeader.self)
      waiting = length
      return starve()
    }
  }

  private func starve() -> Step {
    counters.starvations &+= 1
    return .end(.starved)
  }

  private func deliverWaiting(_ queue: inout DeviceQueue, _ chain: inout DescriptorChain, _ offloads: ReceiveOffloads) -> Step {
    switch gather(isMergeable ? waiting : 1, &queue, &chain) {
    case .broken: return .end(.stopped)
    case .starved: return starve()
    case .enough, .blocked: break
    }
    let length = waiting
    waiting = 0
    guard window.byteCount >= length else {
      counters.tooLong &+= 1
      return .next
    }
    // SAFETY: `spill` holds a packet of `length` bytes, which is at least a header.
    let header = unsafe spill.load(as: NetHeader.self)
    unsafe window.copyIn(UnsafeRawBufferPointer(start: spill, count: length), at: 0)
    return deliver(header, length, &queue, offloads)
  }

  /// Uses up as many chains as the packet fills; its frame is in the window already.
  private func deliver(_ header: NetHeader, _ length: Int, _ queue: inout DeviceQueue, _ offloads: ReceiveOffloads) -> Step {
    var bufferCount = 0
    var covered = 0
    // Bounded by the window, which has room for the packet.
    while covered < length {
      covered += window[bufferCount].byteCount
      bufferCount += 1
    }
    guard let adjusted = ReceiveHeader.adjusted(header, offloads: offloads, bufferCount: UInt16(bufferCount)) else {
      counters.unsuitable &+= 1
      return .next
    }
    unsafe withUnsafeBytes(of: adjusted) { bytes in unsafe window.copyIn(bytes, at: 0) }
    var left = length
    for _ in 0..<bufferCount {
      let entry = window.removeFirst()
      let written = min(left, entry.byteCount)
      left -= written
      // A chain has less than 4 GiB, and `written` at most a packet.
      queue.ring.complete(entry.token, written: UInt32(written))
    }
    counters.received &+= 1
    queue.counters.bytesWritten.add(UInt64(length))
    longestLately = max(longestLately, length)
    framesSinceAdjustment += 1
    if framesSinceAdjustment == 64 {
      wanted = max(Self.ordinaryPacket, longestLately)
      longestLately = 0
      framesSinceAdjustment = 0
    }
    return .next
  }

  private enum Gathered {
    case enough
    /// The ring has no more; kicks are on.
    case starved
    /// The window cannot take the next chain now.
    case blocked
    case broken
  }

  /// Takes chains into the window until it has room for `byteCount`.
  private func gather(_ byteCount: Int, _ queue: inout DeviceQueue, _ chain: inout DescriptorChain) -> Gathered {
    // Bounded by the window: every round adds a chain, uses one up that is good for nothing, or ends.
    while window.byteCount < byteCount {
      switch queue.ring.next(&chain) {
      case .chain: break
      case .empty:
        // Asked for while the window still holds what is there: the driver kicks for what comes behind it, although
        // the window is given back.
        guard queue.ring.enableKicks() else { return .starved }
        queue.ring.disableKicks()
        continue
      case .broken(let reason):
        queue.markBroken(reason)
        return .broken
      }
      guard chain.writableByteCount >= NetHeader.byteCount + 1 else {
        // Only the first chain can be used up out of turn: what lies before it would come back in its place.
        guard window.isEmpty else {
          queue.ring.giveBack(chain.token)
          return .blocked
        }
        counters.uselessBuffers &+= 1
        queue.ring.complete(chain.token, written: 0)
        continue
      }
      guard window.append(&chain) else {
        guard window.isEmpty else {
          queue.ring.giveBack(chain.token)
          return .blocked
        }
        // A chain with more pieces than any frame needs cannot be used at all.
        counters.uselessBuffers &+= 1
        queue.ring.complete(chain.token, written: 0)
        continue
      }
    }
    return .enough
  }

  /// Every chain of the window goes back to the ring, the last one first.
  private func giveBack(_ queue: inout DeviceQueue) {
    // Bounded by the window.
    while let entry = window.removeLast() { queue.ring.giveBack(entry.token) }
  }
}
