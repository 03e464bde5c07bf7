import Glibc
import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

@testable import BackendKit
@testable import NetDevice

let netFrames = Target(
  name: "net", about: "frames and headers of the network card, both ways, and what reaches the tap", seeds: netSeeds, run: exchangeFrames)

private let bench = DeviceBench()
private let rooms = (transmit: GuestRoom(), receive: GuestRoom())

private func netSeeds() -> [[UInt8]] {
  // IPv4 and IPv6 TCP with segmentation; a plain frame; frames the other way, short and long.
  let plain: [UInt8] = [0, 0, 0, 0, 40, 1, 0, 0]
  let v4: [UInt8] = [0, 1, 1, 1, 100, 2, 0, 0]
  let v6: [UInt8] = [0, 2, 4, 1, 120, 2, 0, 0]
  return [
    [0x28, 0x28, 15] + plain + plain + [2, 3], [0x28, 0x28, 15] + v4 + v4 + [2, 3], [0x29, 0x29, 15] + v6 + plain + [2, 3],
    [0x28, 0x28, 15, 1, 3, 1, 3, 4, 60, 0, 4, 200, 5, 5, 4, 255, 15, 5, 3], [0x28, 0x28, 7, 1, 0, 4, 60, 0, 5, 5, 6, 1, 5],
  ]
}

private func exchangeFrames(_ script: inout Script) {
  var shape = RingDriver.shape(&script, packed: script.byte() & 1 == 1)
  shape.features.remove(.inOrder)
  let choice = script.byte()
  var features = shape.features.union([.netChecksum, .netGuestChecksum])
  if choice & 1 != 0 { features.formUnion([.netHostTSO4, .netGuestTSO4]) }
  if choice & 2 != 0 { features.formUnion([.netHostTSO6, .netGuestTSO6]) }
  if choice & 4 != 0 { features.formUnion([.netHostECN, .netGuestECN]) }
  if choice & 16 != 0 { features.subtract([.netChecksum, .netGuestChecksum]) }
  let isMergeable = choice & 8 != 0
  let toTap = TransmitOffloads(features)
  let toGuest = ReceiveOffloads(features)
  var sender = RingDriver(rooms.transmit, size: shape.size, shape.features)
  var receiver = RingDriver(rooms.receive, size: shape.size, shape.features)
  let transmit = TransmitQueue()
  let receive = ReceiveQueue()
  receive.isMergeable = isMergeable
  transmit.start(bench.queue(of: sender))
  receive.start(bench.queue(of: receiver))
  let pair = sure { try UnixSocket.pair(.sequencedPacket) }
  guard let port = try? PacketPort.socket(pair.first) else { return demand(false, "a socket is refused") }
  let tap = pair.second
  var seen: UInt64 = 0
  var sent = 0

  while !script.isOver {
    switch script.byte() % 8 {
    case 0: offerFrame(&sender, &script)
    case 1:
      // Buffers to receive into, long and short.
      for _ in 0...Int(script.byte() & 7) {
        let count = script.byte() & 3 == 0 ? Int(script.byte()) + 1 : 1526
        let buffer = DriverBuffer(GuestAddress(receiver.allocate(count)), UInt32(count), isDeviceWritable: true)
        if receiver.offer([buffer]) == nil { receiver.takeBack(count) }
      }
    case 2:
      _ = transmit.drain(to: script.byte() & 7 == 7 ? nil : port, toTap)
      seen += takeFrames(tap, toTap)
      demand(seen == transmit.counters.transmitted, "\(transmit.counters.transmitted) frames are counted and \(seen) arrived")
      sender.collect()
    case 3: if script.bool() { sender.collect() } else { receiver.collect() }
    case 4:
      let length = Int(script.byte()) + Int(script.byte()) << 8
      var packet = script.take(12)
      packet += [UInt8](repeating: 0, count: max(0, min(70000, length) - packet.count))
      if case .bytes = UnixSocket.send(tap, packet, descriptors: [], waiting: false) { sent += 1 }
    case 5:
      let before = receive.counters.received
      _ = receive.fill(from: port, toGuest)
      if receiver.isHonest, before != receive.counters.received { checkReceived(receiver, isMergeable, toGuest) }
      demand(receive.counters.received <= UInt64(sent), "more frames were received than sent")
      receiver.collect()
    case 6: if script.bool() { sender.misbehave(&script) } else { receiver.misbehave(&script) }
    default: checkVerdict(&script, toTap)
    }
  }
  guard let first = transmit.stop(), let second = receive.stop() else { return demand(false, "a queue does not come back") }
  checkFlight(first.ring, 0)
  checkFlight(second.ring, 0)
}

extension DeviceBench {
  fileprivate func queue(of driver: borrowing RingDriver) -> DeviceQueue {
    let ring = sure { try Virtqueue(driver.configuration, memory: driver.room.memory) }
    return DeviceQueue(index: 0, ring: ring, ports: netPorts, kickFD: -1)
  }
}

private let netPorts = sure { try QueuePorts(QueueCounters(), isServedByLoop: true) }

/// A frame with a header in front, and inside what the header says, more or less.
private func frame(_ script: inout Script) -> [UInt8] {
  let kind = script.byte()
  var header = NetHeader()
  header.gsoType = script.byte()
  header.flags = script.byte() & 3
  var body = [UInt8](repeating: 0x11, count: 14 + Int(script.byte()))
  let change = script.byte()
  if kind & 3 == 1, body.count >= 54 {
    body[12] = 8
    body[13] = 0
    body[14] = 0x45
    body[23] = 6
    body[46] = 0x50
    header.checksumStart = 34
    header.checksumOffset = 16
    header.gsoSize = 1448
  } else if kind & 3 == 2, body.count >= 74 {
    body[12] = 0x86
    body[13] = 0xDD
    body[14] = 0x60
    body[20] = 6
    body[66] = 0x50
    header.checksumStart = 54
    header.checksumOffset = 16
    header.gsoSize = 1428
  }
  for _ in 0..<Int(change & 3) { body[script.below(body.count)] = script.byte() }
  if change & 4 != 0 { header.gsoSize = script.u16() }
  if change & 8 != 0 { header.checksumStart = script.u16() }
  if change & 16 != 0 { header.checksumOffset = script.u16() }
  if change & 32 != 0 { header.headerLength = script.u16() }
  if change & 64 != 0 { header.bufferCount = script.u16() }
  return withUnsafeBytes(of: header) { Array($0) } + body
}

private func offerFrame(_ driver: inout RingDriver, _ script: inout Script) {
  let bytes = frame(&script)
  let place = driver.allocate(bytes.count)
  _ = driver.room.memory.copyIn(bytes, at: GuestAddress(place))
  var buffers: [DriverBuffer] = []
  var done = 0
  let pieces = Int(script.byte() & 3)
  for piece in 0...pieces {
    let count = piece == pieces ? bytes.count - done : min(bytes.count - done, Int(script.byte()) + 1)
    if count > 0 { buffers.append(DriverBuffer(GuestAddress(place + UInt64(done)), UInt32(count), isDeviceWritable: false)) }
    done += count
  }
  driver.offer(buffers, indirect: script.bool() && driver.configuration.features.contains(.indirectDescriptors))
}

/// What reaches the tap is what was agreed on, whatever the driver wrote.
private func takeFrames(_ tap: borrowing OwnedFD, _ offloads: TransmitOffloads) -> UInt64 {
  var count: UInt64 = 0
  var bytes = [UInt8](repeating: 0, count: 80000)
  for _ in 0..<512 {
    guard let length = receive(tap, into: &bytes) else { break }
    count += 1
    demand(length >= 12 + 14, "a frame of \(length) bytes with its header")
    let header = bytes.withUnsafeBytes { $0.load(as: NetHeader.self) }
    check(header, length - 12, offloads)
  }
  return count
}

private func check(_ header: NetHeader, _ frameByteCount: Int, _ offloads: TransmitOffloads) {
  demand(header.flags & ~NetHeader.needsChecksum == 0, "flags 0x\(String(header.flags, radix: 16)) reach the tap")
  demand(header.bufferCount == 0, "a buffer count reaches the tap")
  if header.flags != 0 {
    demand(offloads.contains(.checksum), "a checksum that was not negotiated")
    demand(Int(header.checksumStart) + Int(header.checksumOffset) + 2 <= frameByteCount, "a checksum beyond the frame")
  }
  switch header.gsoType & ~NetHeader.gsoECN {
  case NetHeader.gsoNone: demand(header.gsoType == 0, "ECN without segmentation")
  case NetHeader.gsoTCPv4: demand(offloads.contains(.tso4), "segmentation that was not negotiated")
  case NetHeader.gsoTCPv6: demand(offloads.contains(.tso6), "segmentation that was not negotiated")
  default: demand(false, "segmentation of kind \(header.gsoType)")
  }
  if header.gsoType != 0 {
    demand(header.flags == NetHeader.needsChecksum && header.gsoSize >= 8, "segmentation without checksum or size")
    demand(Int(header.headerLength) <= frameByteCount && header.headerLength >= 54, "headers of \(header.headerLength) bytes")
  }
}

/// The verdict alone, on headers of any kind.
private func checkVerdict(_ script: inout Script, _ offloads: TransmitOffloads) {
  let bytes = frame(&script)
  let header = bytes.withUnsafeBytes { $0.load(as: NetHeader.self) }
  let body = Array(bytes.dropFirst(12))
  let inspected = TransmitHeader.inspectedByteCount(header, frameByteCount: body.count)
  demand(inspected <= min(body.count, TransmitHeader.greatestHeaders), "more is inspected than there is")
  let copy = Array(body[..<inspected])
  let verdict = copy.withUnsafeBytes { TransmitHeader.check(header, frameByteCount: body.count, start: $0, offloads: offloads) }
  if case .success(let checked) = verdict { check(checked.header, body.count, offloads) }
}

/// What an honest driver finds in its buffers: a header that counts them, nothing it has not agreed to.
private func checkReceived(_ driver: borrowing RingDriver, _ isMergeable: Bool, _ offloads: ReceiveOffloads) {
  let configuration = driver.configuration
  guard !configuration.isPacked else { return }
  let memory = driver.room.memory
  let used = memory.load(UInt16.self, at: GuestAddress(configuration.device.rawValue + 2)) ?? 0
  // The driver has seen all before these; the first of them begins a frame.
  var index = UInt16(truncatingIfNeeded: driver.collected)
  while index != used {
    let element = configuration.device.rawValue + 4 + 8 * UInt64(index % configuration.size)
    let head = memory.load(UInt32.self, at: GuestAddress(element)) ?? .max
    let written = memory.load(UInt32.self, at: GuestAddress(element + 4)) ?? 0
    demand(head < UInt32(configuration.size), "head \(head) is used")
    guard written > 0 else {
      index &+= 1
      continue
    }
    let place = memory.load(UInt64.self, at: GuestAddress(configuration.descriptors.rawValue + 16 * UInt64(head))) ?? 0
    guard let bytes = memory.bytes(at: GuestAddress(place), count: 12) else { return demand(false, "a buffer is no memory") }
    let header = bytes.withUnsafeBytes { $0.load(as: NetHeader.self) }
    demand(header.bufferCount >= 1 && (isMergeable || header.bufferCount == 1), "a frame in \(header.bufferCount) buffers")
    demand(header.bufferCount <= used &- index, "a frame in more buffers than were used")
    demand(header.flags == 0 || offloads.contains(.checksum), "a checksum the driver has not agreed to")
    demand(header.gsoType == 0 || offloads.hasSegmentation, "segmentation the driver has not agreed to")
    index &+= header.bufferCount
  }
}
