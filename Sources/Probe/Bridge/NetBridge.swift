import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Plays the guest of a network card: what the card gives goes to a tap or into a capture file, what comes from the tap or
/// stands in a capture file goes to the card.
final class NetBridge {
  private static let ringSize: UInt16 = 256
  private static let emptyHeader = [UInt8](repeating: 0, count: FrameRing.headerByteCount)
  /// Frames up to this long are taken and sent: whole segments of TCP where card and tap leave cutting them to each other.
  private let frameByteCount: Int
  /// What was agreed on of checksums and segmentation; headers then mean something.
  let offloads: FeatureSet

  private var link: Link
  private var receive: FrameRing
  private var transmit: FrameRing
  private var freeSlots: [Int]
  private let target: Target
  private let tap: Tap?
  private let captured: OutputFile?

  private final class Tap {
    let device: TapDevice
    init(_ device: consuming TapDevice) { self.device = device }

    /// The tap hands over what the card does itself.
    func leave(_ offloads: FeatureSet) throws(ProbeError) {
      var flags: TapDevice.Offloads = []
      if offloads.contains(.netChecksum) { flags.insert(.checksum) }
      if offloads.contains(.netHostTSO4) { flags.insert(.tso4) }
      if offloads.contains(.netHostTSO6) { flags.insert(.tso6) }
      try wrapping { () throws(SystemError) in try device.setOffloads(flags) }
    }
  }

  /// What can be agreed on of what the card offers: segmentation only with the checksum it needs.
  private static func offloads(_ offered: FeatureSet) -> FeatureSet {
    var offloads: FeatureSet = []
    if offered.contains(.netChecksum) { offloads.formUnion(offered.intersection([.netChecksum, .netHostTSO4, .netHostTSO6])) }
    if offered.contains(.netGuestChecksum) {
      offloads.formUnion(offered.intersection([.netGuestChecksum, .netGuestTSO4, .netGuestTSO6]))
    }
    return offloads
  }

  private var buffer: [UInt8]
  private(set) var sentCount = 0
  private(set) var receivedCount = 0
  private(set) var droppedCount = 0

  /// - Parameter mayOffload: whether checksums and large segments may be left to card and tap; only a tap can do with them.
  init(_ target: Target, tap: String?, capture: String?, mayOffload: Bool) throws(ProbeError) {
    var link = try Link(target)
    do throws(ProbeError) { try link.negotiate() } catch { throw target.explaining(error) }
    try DeviceGuess.expect(.net, link.offer, target)
    let offloads = tap != nil && mayOffload ? Self.offloads(link.offer.features) : []
    self.offloads = offloads
    frameByteCount = (offloads.isEmpty ? 16384 : 65600) - FrameRing.headerByteCount
    buffer = [UInt8](repeating: 0, count: frameByteCount + FrameRing.headerByteCount)
    let features = link.offer.features.intersection([.version1, .eventIndex]).union(offloads)
    try link.accept(features)
    let ringBytes = VirtqueueConfiguration.contiguousByteCount(size: Self.ringSize, features: features) + 8192
    let buffers = 2 * Int(Self.ringSize) * (frameByteCount + 128)
    let arena = try Arena(byteCount: UInt64(2 * ringBytes + buffers + (1 << 20)))
    let first = try ProbeRing(0, size: Self.ringSize, features: features, arena: arena)
    let second = try ProbeRing(1, size: Self.ringSize, features: features, arena: arena)
    try link.share(arena)
    try link.start(first)
    try link.start(second)
    try link.ready()
    if let name = tap {
      do throws(TapError) { self.tap = Tap(try TapDevice.open(name)) } catch { throw .unsuitable("\(error)") }
      try self.tap?.leave(offloads)
    } else {
      self.tap = nil
    }
    captured = try capture.map { path throws(ProbeError) in try OutputFile(path, PcapFile.header) }
    receive = try .make(first, slotCount: Int(Self.ringSize), frameByteCount: frameByteCount, isReceiving: true)
    transmit = try .make(second, slotCount: Int(Self.ringSize), frameByteCount: frameByteCount, isReceiving: false)
    freeSlots = Array(0..<Int(Self.ringSize))
    self.link = link
    self.target = target
    for slot in 0..<receive.slotCount { _ = receive.give(slot) }
    _ = receive.publish()
  }

  /// Until interrupted, until `limit`, or until all frames are sent and nothing has come for `linger`.
  ///
  /// - Parameter pace: whether frames keep the distances they had when they were captured.
  func run(
    _ interruption: Interruption, frames: [PcapFile.Frame]?, pace: Bool, limit: Duration?, linger: Duration
  ) throws(ProbeError) {
    let begin = MonotonicTime.now
    var next = 0
    var lastMoved = begin
    var shown = begin
    while !interruption.isRequested {
      let now = MonotonicTime.now
      if now.since(shown) >= .milliseconds(500) {
        shown = now
        Progress.show("\(sentCount) frames to the card, \(receivedCount) from it")
      }
      if let limit, now.since(begin) >= limit { break }
      var wait = Duration.milliseconds(200)
      if let frames {
        // Bounded by the ring: a frame that has no slot waits.
        while next < frames.count, !freeSlots.isEmpty {
          let due =
            pace
            ? Duration.nanoseconds(Int64(clamping: frames[next].nanoseconds &- min(frames[next].nanoseconds, frames[0].nanoseconds)))
            : .zero
          let left = due - now.since(begin)
          if left > .zero {
            wait = min(wait, left)
            break
          }
          if send(frames[next].bytes) { capture(frames[next].bytes) }
          next += 1
          lastMoved = now
        }
        if next == frames.count, freeSlots.count == transmit.slotCount {
          if now.since(lastMoved) >= linger { break }
          wait = min(wait, linger - now.since(lastMoved))
        }
      }
      if transmit.publish() {}
      let isReady = receive.ring.queue.enableCalls() || transmit.ring.queue.enableCalls()
      var entries = [
        pollfd(fd: interruption.descriptor, events: Int16(POLLIN), revents: 0),
        pollfd(fd: link.frontEnd.socketNumber, events: Int16(POLLIN), revents: 0),
        pollfd(fd: receive.ring.call.fd.rawValue, events: Int16(POLLIN), revents: 0),
        pollfd(fd: transmit.ring.call.fd.rawValue, events: Int16(POLLIN), revents: 0),
        pollfd(fd: tapNumber, events: freeSlots.isEmpty ? 0 : Int16(POLLIN), revents: 0),
      ]
      let milliseconds = isReady ? 0 : CInt((wait.nanoseconds + 999_999) / 1_000_000)
      // SAFETY: the array is ours and has so many entries.
      _ = unsafe entries.withUnsafeMutableBufferPointer { unsafe poll($0.baseAddress, nfds_t($0.count), milliseconds) }
      if entries[1].revents != 0 { throw target.explaining(.unsuitable("The back end closed the connection")) }
      receive.ring.call.drain()
      transmit.ring.call.drain()
      if try takeReceived() { lastMoved = .now }
      try takeSent()
      if entries[4].revents & Int16(POLLIN) != 0 { readTap() }
    }
    Progress.clear()
    for index in 0...1 { _ = try? link.stop(index) }
  }

  private var tapNumber: CInt { tap?.device.fd.rawValue ?? -1 }

  private func takeReceived() throws(ProbeError) -> Bool {
    var count = 0
    // Bounded: no more than all buffers at a time.
    loop: while count < receive.slotCount {
      switch receive.take() {
      case .slot(let slot, let byteCount):
        count += 1
        if byteCount > 0, byteCount <= frameByteCount {
          let bytes = receive.frameBytes(slot, byteCount)
          receivedCount += 1
          writeTap(bytes, header: offloads.contains(.netGuestChecksum) ? receive.headerBytes(slot) : Self.emptyHeader)
          capture(bytes)
        } else {
          droppedCount += 1
        }
        _ = receive.give(slot)
      case .empty: break loop
      case .broken: throw .notVhostUser("the receive ring reports a chain that is not outstanding, or too many")
      }
    }
    if count > 0 { _ = receive.publish() }
    return count > 0
  }

  private func takeSent() throws(ProbeError) {
    // Bounded: no more than all slots are outstanding.
    while true {
      switch transmit.take() {
      case .slot(let slot, _): freeSlots.append(slot)
      case .empty: return
      case .broken: throw .notVhostUser("the transmit ring reports a chain that is not outstanding, or too many")
      }
    }
  }

  /// False for a frame that is too long.
  private func send(_ frame: [UInt8], header: [UInt8] = emptyHeader) -> Bool {
    guard frame.count <= frameByteCount, frame.count >= 14, let slot = freeSlots.popLast() else {
      droppedCount += 1
      return false
    }
    transmit.fill(slot, frame, header: header)
    guard transmit.give(slot, frameByteCount: frame.count) else {
      freeSlots.append(slot)
      droppedCount += 1
      return false
    }
    sentCount += 1
    return true
  }

  private func readTap() {
    guard let tap else { return }
    // Bounded by the free slots.
    while !freeSlots.isEmpty {
      // SAFETY: the buffer is ours and writable for its whole count.
      guard case .bytes(let count) = unsafe buffer.withUnsafeMutableBytes({ unsafe tap.device.fd.read(into: $0) }), count > 12 else {
        break
      }
      let frame = Array(buffer[12..<count])
      if send(frame, header: offloads.contains(.netChecksum) ? Array(buffer[..<12]) : Self.emptyHeader) { capture(frame) }
    }
    _ = transmit.publish()
  }

  private func writeTap(_ frame: [UInt8], header: [UInt8]) {
    guard let tap else { return }
    // The kernel judges the header; what it does not like it refuses.
    let bytes = header + frame
    // SAFETY: the array is not changed during the call.
    if case .bytes = unsafe bytes.withUnsafeBytes({ unsafe tap.device.fd.write($0) }) { return }
    droppedCount += 1
  }

  private func capture(_ frame: [UInt8]) {
    guard let captured else { return }
    var time = timespec()
    // SAFETY: `time` is ours.
    unsafe clock_gettime(CLOCK_REALTIME, &time)
    let stamp = UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    captured.write(PcapFile.record(PcapFile.Frame(nanoseconds: stamp, bytes: frame)))
  }
}
