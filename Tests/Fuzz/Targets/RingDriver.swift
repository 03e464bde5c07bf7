import HostSystem
import VMMemory
import VirtioQueue
import VirtioSpec

/// The driver of a target: an honest one that a script makes dishonest.
struct RingDriver: ~Copyable {
  let room: GuestRoom
  let configuration: VirtqueueConfiguration
  var queue: DriverQueue
  /// It has kept every rule so far: what is used must be what it made available.
  var isHonest = true
  var offered = 0
  var collected = 0
  private var place: UInt64 = GuestRoom.buffers

  init(_ room: GuestRoom, size: UInt16, _ features: FeatureSet) {
    room.clear()
    self.room = room
    configuration = .contiguous(size: size, features: features, at: GuestAddress(GuestRoom.ring))
    let configuration = configuration
    queue = sure { try DriverQueue(configuration, memory: room.memory) }
  }

  /// Features and a size as a script has them.
  static func shape(_ script: inout Script, packed: Bool) -> (size: UInt16, features: FeatureSet) {
    let choice = script.byte()
    var features: FeatureSet = packed ? [.version1, .packedRing] : [.version1]
    if choice & 1 == 0 { features.insert(.indirectDescriptors) }
    if choice & 2 == 0 { features.insert(.eventIndex) }
    if choice & 4 != 0 { features.insert(.inOrder) }
    let exponent = UInt16(choice >> 3 & 7)
    var size: UInt16 = 1 << min(6, exponent)
    if packed, choice & 0x40 != 0 { size = max(1, size - size / 3) }
    return (size, features)
  }

  /// Room for a buffer, used round and round.
  mutating func allocate(_ count: Int) -> UInt64 {
    if place + UInt64(count) > GuestRoom.end { place = GuestRoom.buffers }
    defer { place += UInt64(count) }
    return place
  }

  /// What was allocated last is not used: the ring had no room. Else a driver that goes on offering comes round to buffers that are
  /// still available.
  mutating func takeBack(_ count: Int) { place -= UInt64(count) }

  /// Makes a chain available, or not if there is no room.
  @discardableResult
  mutating func offer(_ buffers: [DriverBuffer], indirect: Bool = false) -> UInt16? {
    let head: UInt16?
    // A table stays as it is until its chain is used.
    if indirect, offered - collected < 32 {
      let table = GuestRoom.tables + UInt64(offered % 32) * 256
      head = buffers.count <= 16 ? queue.addIndirect(buffers.span, table: GuestAddress(table)) : nil
    } else {
      head = queue.add(buffers.span)
    }
    _ = queue.publish()
    if head != nil { offered += 1 }
    return head
  }

  /// A chain of the script's own, sound or not.
  mutating func offerAny(_ script: inout Script) {
    let shape = script.byte()
    var buffers: [DriverBuffer] = []
    for index in 0...Int(shape & 7) {
      let isWritable = shape & 8 != 0 || index > Int(shape >> 5)
      if shape & 0x10 == 0 {
        let count = Int(script.byte()) + 1
        buffers.append(DriverBuffer(GuestAddress(allocate(count)), UInt32(count), isDeviceWritable: isWritable))
      } else {
        isHonest = false
        buffers.append(
          DriverBuffer(GuestAddress(GuestRoom.address(&script)), GuestRoom.length(&script), isDeviceWritable: script.bool()))
      }
    }
    let wantsTable = shape & 0x40 != 0
    if wantsTable, !configuration.features.contains(.indirectDescriptors) { isHonest = false }
    offer(buffers, indirect: wantsTable)
  }

  /// Breaks a rule of the script's choice.
  mutating func misbehave(_ script: inout Script) {
    isHonest = false
    let size = configuration.size
    let index = UInt16(script.below(Int(size)))
    switch script.byte() % 5 {
    case 0: room.scribble(&script)
    case 1:
      if configuration.isPacked {
        let flags = script.byte() & 1 == 0 ? queue.availableMark : 0
        queue.writeDescriptor(
          index, address: GuestRoom.address(&script), length: GuestRoom.length(&script), third: script.u16() & 0xFF,
          fourth: flags | script.u16() & 7)
      } else {
        queue.writeDescriptor(
          index, address: GuestRoom.address(&script), length: GuestRoom.length(&script), third: script.u16() & 7,
          fourth: UInt16(script.below(Int(size) + 2)))
      }
    case 2: if !configuration.isPacked { queue.publishHead(UInt16(script.below(Int(size) + 3))) }
    case 3: if !configuration.isPacked { queue.setAvailableIndex(script.u16()) }
    default:
      // An indirect table with anything in it.
      let table = GuestRoom.tables + UInt64(script.below(32)) * 16
      for entry in 0..<UInt64(script.byte() & 7) {
        let here = table + 16 * entry
        _ = room.memory.store(GuestRoom.address(&script), at: GuestAddress(here))
        _ = room.memory.store(GuestRoom.length(&script), at: GuestAddress(here + 8))
        _ = room.memory.store(script.u16() & 7, at: GuestAddress(here + 12))
        _ = room.memory.store(script.u16() & 15, at: GuestAddress(here + 14))
      }
      let count = script.byte() & 7
      let length = UInt32(count) * 16 &+ (count == 7 ? script.u32() : 0)
      queue.writeDescriptor(
        index, address: table + UInt64(script.byte() & 3), length: length, third: configuration.isPacked ? index : 4 | script.u16() & 1,
        fourth: configuration.isPacked ? queue.availableMark | 4 : script.u16())
    }
  }

  /// Takes everything used. An honest driver never hears of what it did not offer, nor twice of anything.
  mutating func collect() {
    // Bounded by the ring for an honest driver, and by a number for any other.
    for _ in 0..<200 {
      switch queue.nextUsed() {
      case .empty: return
      case .broken:
        demand(!isHonest, "an honest driver was told of something that was not outstanding")
        return
      case .used:
        collected += 1
        if isHonest { demand(collected <= offered, "more was used than was made available") }
      }
    }
    demand(!isHonest, "an honest driver was told of more than a ring can hold")
  }
}
