import CLinux
import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// What is done with requests.
extension Session {
  func process(_ ring: Ring) {
    guard ring.isStarted, ring.isEnabled, ring.wasKicked || has("polls") else { return }
    if has("stop-late") {
      guard ring.isLate else { return }
      usleep(100_000)
    }
    ring.wasKicked = false
    guard let index = rings.firstIndex(where: { $0 === ring }) else { return }
    if has("last-queue"), index == rings.count - 1 { return }
    if has("queues-one"), rings.firstIndex(where: \.isStarted) != index { return }
    if device == .console, features.contains(.consoleMultiplePorts), index == 2 || index == 4 {
      if index == 2 { announce(ring) }
      return
    }
    if device != .block, device != .entropy, index == 0 {
      guard has("receive-uses"), case .chain? = ring.queue?.next(&chain) else { return }
      ring.queue?.complete(chain.token, written: 3 + (device == .console ? 1000 : 0))
      _ = ring.queue?.publish()
      return
    }
    if has("packed-dead"), features.contains(.packedRing) { return }
    if has("split-dead"), !features.contains(.packedRing) { return }
    var turns = 0
    while turns < 100_000 {
      turns += 1
      if features.contains(.accessPlatform), let queue = ring.queue?.base.rawValue, let address = ring.address {
        let missing = translation.missing(next: UInt16(truncatingIfNeeded: queue), of: address, size: UInt16(ring.size))
        for page in missing { miss(page) }
        if !missing.isEmpty { return }
      }
      let outcome = ring.queue?.next(&chain) ?? .empty
      switch outcome {
      case .chain:
        let written = serve(index)
        let token = chain.token
        let head = token.head
        if has("wrap"), ring.done >= 20 { return }
        ring.done += 1
        ring.queue?.complete(token, written: written)
        let wantsCall = ring.queue?.publish() ?? false
        if let inflight { spoil(inflight.mapping, inflight.area, index, head) }
        if has("dies-early"), ring.done == 300 { abort() }
        if has("answers-twice"), ring.done == 50 { answerAgain(ring) }
        if wantsCall { call(ring, index) }
        if device == .console, index == 3, features.contains(.consoleMultiplePorts) { announce(rings[2]) }
      case .empty:
        if ring.queue?.enableKicks() != true { return }
      case .broken:
        Habits.stray()
        if has("abort-malformed") { abort() }
        if has("hang-malformed") { while true { pause() } }
        if has("leak-malformed") { for _ in 0..<8 { leaked.append(dup(0)) } }
        return
      }
    }
  }

  func call(_ ring: Ring, _ index: Int) {
    if has("no-call") { return }
    if let number = ring.call?.rawValue {
      var one: UInt64 = 1
      _ = write(number, &one, 8)
    } else if protocolFeatures.contains(.inbandNotifications), !has("inband-mute") {
      ask(.vringCall(VringState(index: UInt32(index), number: 0)))
    }
  }

  /// The last used element once more (split rings).
  func answerAgain(_ ring: Ring) {
    guard let memory, let device = ring.queue?.configuration.device.rawValue,
      let index = memory.load(UInt16.self, at: GuestAddress(device + 2))
    else { return }
    let size = UInt16(ring.size)
    guard let element = memory.load(UInt64.self, at: GuestAddress(device + 4 + 8 * UInt64((index &- 1) % size))) else { return }
    _ = memory.store(element, at: GuestAddress(device + 4 + 8 * UInt64(index % size)))
    _ = memory.store(index &+ 1, at: GuestAddress(device + 2))
  }

  /// Gives the driver the control messages that wait, as far as there are buffers.
  func announce(_ ring: Ring) {
    guard ring.isStarted, ring.isEnabled else { return }
    while let message = announcements.first, case .chain? = ring.queue?.next(&chain) {
      announcements.removeFirst()
      let count = message.withUnsafeBytes { chain.put($0) }
      ring.queue?.complete(chain.token, written: UInt32(count))
      if ring.queue?.publish() == true { call(ring, 2) }
    }
    _ = ring.queue?.enableKicks()
  }

  /// What is wrong with the record, if anything is.
  func spoil(_ mapping: MemoryMapping, _ area: InflightDescription, _ index: Int, _ head: UInt16) {
    guard index < Int(area.queueCount) else { return }
    let start = Int(area.mapOffset) + Int(area.size) / Int(area.queueCount) * index
    if has("inflight-marks") { mapping.baseAddress.storeBytes(of: 1, toByteOffset: start + 16, as: UInt8.self) }
    if has("inflight-version") { mapping.baseAddress.storeBytes(of: 2, toByteOffset: start + 8, as: UInt16.self) }
    if features.contains(.packedRing) {
      if has("inflight-place") { mapping.baseAddress.storeBytes(of: 9, toByteOffset: start + 18, as: UInt16.self) }
      if has("inflight-list") { mapping.baseAddress.storeBytes(of: 0, toByteOffset: start + 34, as: UInt16.self) }
      if has("inflight-copies") {
        for entry in 1...64 { mapping.baseAddress.storeBytes(of: 0, toByteOffset: start + 32 * entry + 24, as: UInt64.self) }
      }
      return
    }
    if has("inflight-head") { mapping.baseAddress.storeBytes(of: 63, toByteOffset: start + 12, as: UInt16.self) }
    if has("inflight-counter") { mapping.baseAddress.storeBytes(of: 7, toByteOffset: start + 24 + 16 * Int(head), as: UInt64.self) }
  }

  /// Where this ring's part of the inflight area is, when there is one.
  func inflightRegion(_ ring: Ring) -> InflightRegion? {
    guard let (mapping, area) = inflight, !has("inflight-clear"), !has("inflight-forgets"),
      let index = rings.firstIndex(where: { $0 === ring }), index < Int(area.queueCount)
    else { return nil }
    let stride = Int(area.size) / Int(area.queueCount)
    return InflightRegion(mapping, offset: Int(area.mapOffset) + stride * index, byteCount: stride)
  }

  func serve(_ index: Int) -> UInt32 {
    let answer: [UInt8]
    if has("framing"), chain.readable.count + chain.writable.count > 3 || chain.readable.count > 2 { return 0 }
    var readable = [UInt8](repeating: 0, count: chain.readableByteCount)
    readable.withUnsafeMutableBytes { chain.takeReadable(into: $0) }
    Habits.note("chain \(readable.count) \(Habits.digest(readable)) \(chain.writable.count) \(chain.writableByteCount)")
    switch device {
    case .block: answer = block(readable, chain.writableByteCount)
    case .fileSystem: answer = fuse(readable, chain.writableByteCount)
    case .entropy:
      if has("rng-abort"), !readable.isEmpty { abort() }
      if has("rng-empty") { return 0 }
      answer = (0..<chain.writableByteCount).map { has("rng-same") ? UInt8(truncatingIfNeeded: $0) : .random(in: 0...255) }
    case .console where index == 3 && features.contains(.consoleMultiplePorts):
      control(readable)
      return 0
    default: return transmit(readable, index)
    }
    let count = answer.withUnsafeBytes { chain.put($0) }
    touch()
    if device == .block, has("read-length"), count > 1 { return UInt32(count - 1) }
    return UInt32(count)
  }

  func transmit(_ readable: [UInt8], _ index: Int) -> UInt32 {
    if has("port-transmit"), index == 5 { return UInt32(readable.count) }
    if has("transmit-length") { return UInt32(readable.count) }
    if has("transmit-abort"), readable.isEmpty || readable.count < 26 || readable.first == 0xFF {
      if device == .net || readable.isEmpty { abort() }
    }
    return 0
  }

  func fuse(_ readable: [UInt8], _ room: Int) -> [UInt8] {
    if readable.count < 40 || room < 16 {
      if has("fuse-abort") { abort() }
      return []
    }
    let operation = readable[4]
    let unique = Array(readable[8..<16])
    if operation == 26, readable[5] == 0 {
      let body = [7, 0, 0, 0, 31, 0, 0, 0] + [UInt8](repeating: 0, count: 56)
      return [80, 0, 0, 0, 0, 0, 0, 0] + (has("fuse-unique") ? zero : unique) + body
    }
    let error: Int32 = has("fuse-accepts") ? 0 : -38
    return [16, 0, 0, 0] + (0..<4).map { UInt8(truncatingIfNeeded: error >> Int32(8 * $0)) } + unique
  }

  /// Marks what was written in the dirty log: all of it, which is more than needed, and never wrong.
  func touch() {
    guard let log, features.contains(.vhostLogAll), !has("log-nothing") else { return }
    let limit = min(log.byteCount, has("log-everything") ? log.byteCount : 4096)
    memset(log.baseAddress, 0xFF, limit)
  }
}
