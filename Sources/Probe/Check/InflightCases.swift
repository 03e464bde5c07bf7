import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// The inflight area, field by field, for rings of both layouts: what a back end writes while it works, and what it makes of
/// an area that another one left behind.
enum InflightCases {
  static let all: [CheckCase] = split + packed

  private static let section = "vhost-user, inflight I/O tracking"
  private static let entries = 64

  /// A client whose ring has an area, and where that ring's part of it is.
  private struct Tracked {
    let client: RingClient
    let map: MemoryMapping
    let start: Int
    let isPacked: Bool

    /// Bytes of the header, and of each entry.
    var unit: Int { isPacked ? 32 : 16 }
    func header() -> [UInt8] { map.bytes(start..<start + unit) }
    func entry(_ index: Int) -> [UInt8] { map.bytes(start + unit + unit * index..<start + 2 * unit + unit * index) }

    func store(_ value: UInt64, _ count: Int, _ offset: Int) {
      // SAFETY: `tracked` checked that the area holds the header and all entries; offsets are below that.
      for index in 0..<count {
        unsafe map.baseAddress.storeBytes(
          of: UInt8(truncatingIfNeeded: value >> UInt64(8 * index)), toByteOffset: start + offset + index, as: UInt8.self)
      }
    }

    func store(_ value: UInt64, _ count: Int, entry: Int, _ offset: Int) { store(value, count, unit + unit * entry + offset) }
  }

  /// - Parameter starts: otherwise the area and the ring are as a predecessor left them, and the ring is not started.
  private static func tracked(_ context: CheckContext, packed: Bool = false, starts: Bool = true) throws -> Tracked {
    try context.needs(.inflightShmFD)
    if packed { try context.needs(.packedRing) }
    let client = try context.client(
      RingClient.Setup(features: packed ? .packedRing : [], ringSize: UInt16(entries), starts: false))
    let index = UInt16(client.ring.index)
    try client.link.send(.setVringNum(VringState(index: UInt32(index), number: UInt32(entries))))
    var answered = try client.link.perform(
      .getInflightFD(InflightDescription(queueCount: index + 1, queueSize: UInt16(entries))))
    guard case .inflight(let area) = answered.reply, let fd = answered.descriptors.takeFirst() else {
      throw CaseStop.fail("no area was given")
    }
    let stride = Int(clamping: area.size) / Int(index + 1)
    let unit = packed ? 32 : 16
    guard stride >= unit * (entries + 1), area.size < 1 << 30, area.mapOffset < 1 << 30 else {
      throw CaseStop.fail("an area of \(area.size) bytes does not hold \(entries) entries of \(unit) bytes and a header")
    }
    let map = try MemoryMapping.shared(fd, offset: 0, byteCount: Int(area.mapOffset + area.size))
    let tracked = Tracked(client: client, map: map, start: Int(area.mapOffset) + stride * Int(index), isPacked: packed)
    if !starts { try packed ? leavePackedBehind(tracked, context) : leaveSplitBehind(tracked, context) }
    try client.link.send(.setInflightFD(area), descriptors: [fd.rawValue])
    if starts { try client.start() }
    return tracked
  }

  private static func expectHeader(_ context: CheckContext, _ tracked: Tracked) throws {
    let header = tracked.header()
    try context.expect(header.number(at: 0, 8) == 0, "the features word is not zero: \(header.hexText())")
    try context.expect(header.number(at: 8, 2) == 1, "version \(header.number(at: 8, 2)) instead of 1: \(header.hexText())")
    try context.expect(
      header.number(at: 10, 2) == entries, "\(header.number(at: 10, 2)) entries instead of \(entries): \(header.hexText())")
  }

  private static func expectNothingInFlight(_ context: CheckContext, _ tracked: Tracked) throws {
    for index in 0..<entries {
      let entry = tracked.entry(index)
      try context.expect(entry[0] == 0, "entry \(index) is marked though nothing is in flight: \(entry.hexText())")
    }
  }

  /// One request, completed; its head or buffer id.
  private static func request(_ tracked: Tracked) throws -> UInt16 {
    let head = try tracked.client.offerPing()
    guard let used = try tracked.client.takeUsed() else { throw CaseStop.fail("a request was not completed") }
    guard used.head == head else { throw CaseStop.fail("chain \(used.head) was completed instead of \(head)") }
    return head
  }

  /// After a start of what a predecessor left behind: chain `head` is done, once, and then everything goes on.
  private static func expectResubmission(_ context: CheckContext, _ tracked: Tracked, _ head: UInt16, base: UInt32) throws {
    let client = tracked.client
    try client.start(base: base)
    client.ring.kick.signal()
    guard let used = try client.takeUsed() else { throw CaseStop.fail("the request was not completed") }
    try context.expect(used.head == head, "chain \(used.head) was completed instead of \(head)")
    try context.expect(try client.takeUsed(within: .milliseconds(50)) == nil, "it was completed twice")
    try context.soon { try context.expect(tracked.entry(0)[0] == 0, "its entry is still marked: \(tracked.entry(0).hexText())") }
    try client.ping()
  }

  // MARK: Split rings

  private static let split: [CheckCase] = [
    CheckCase("inflight.header", "The area's header has version 1, the ring's size, and the used index after every request", section) {
      context in
      let tracked = try tracked(context)
      for count in 1...3 {
        _ = try request(tracked)
        try context.soon {
          try expectHeader(context, tracked)
          let header = tracked.header()
          try context.expect(
            header.number(at: 14, 2) == count, "used_idx is \(header.number(at: 14, 2)) after \(count) requests: \(header.hexText())")
        }
      }
    },
    CheckCase("inflight.batch", "The last batch begins at the chain that was completed last", section) { context in
      let tracked = try tracked(context)
      for _ in 0..<3 {
        let head = try request(tracked)
        try context.soon {
          let header = tracked.header()
          try context.expect(
            header.number(at: 12, 2) == head, "last_batch_head is \(header.number(at: 12, 2)) instead of \(head): \(header.hexText())")
        }
      }
      try context.soon { try expectNothingInFlight(context, tracked) }
    },
    CheckCase("inflight.counters", "Each request taken gets a counter greater than the one before", section) { context in
      let tracked = try tracked(context)
      var last: UInt64 = 0
      for turn in 1...3 {
        let entry = tracked.entry(Int(try request(tracked)))
        let counter = entry.number(at: 8, 8)
        try context.expect(
          turn == 1 || counter > last, "request \(turn) has counter \(counter), the one before \(last): \(entry.hexText())")
        last = counter
      }
    },
    CheckCase("inflight.resubmits", "A request that a predecessor had taken and not completed is done again, and once", section) {
      context in
      let tracked = try tracked(context, starts: false)
      // The base is the used index, as front ends that know no better give it.
      try expectResubmission(context, tracked, 0, base: 1)
    },
  ]

  /// Ring and area as a back end leaves them that took two chains, gave back the second, and died with the first in hand.
  private static func leaveSplitBehind(_ tracked: Tracked, _ context: CheckContext) throws {
    let client = tracked.client
    let first = try client.offerPing(kick: false)
    let second = try client.offerPing(kick: false)
    try context.expect(first == 0, "the probe's first chain is \(first)")
    let used = client.ring.queue.configuration.device.rawValue
    guard client.arena.memory.store(UInt32(second), at: GuestAddress(used + 4)),
      client.arena.memory.store(UInt16(1), at: GuestAddress(used + 2))
    else { throw CaseStop.fail("the probe lost its ring") }
    tracked.store(1, 2, 8)
    tracked.store(UInt64(entries), 2, 10)
    tracked.store(UInt64(second), 2, 12)
    tracked.store(1, 2, 14)
    tracked.store(1, 1, entry: 0, 0)
    tracked.store(1, 8, entry: 0, 8)
    tracked.store(2, 8, entry: Int(second), 8)
    guard try client.takeUsed()?.head == second else { throw CaseStop.fail("the probe does not see its own used ring") }
  }

  // MARK: Packed rings

  private static let packed: [CheckCase] = [
    CheckCase(
      "inflight.packed-header", "Both used positions and wrap counters of a packed ring's area follow every request, round the ring",
      section
    ) { context in
      let tracked = try tracked(context, packed: true)
      let step = tracked.client.pingDescriptorCount
      for count in 1...entries / step + 3 {
        _ = try tracked.client.ping()
        // Long enough to see each of the first, and those round the end.
        guard count <= 3 || count * step >= entries - step else { continue }
        let place = count * step % entries
        let wrap = count * step / entries % 2 == 0 ? 1 : 0
        try context.soon {
          try expectHeader(context, tracked)
          let header = tracked.header()
          for (name, offset, width, expected) in [
            ("used_idx", 16, 2, place), ("old_used_idx", 18, 2, place), ("used_wrap_counter", 20, 1, wrap),
            ("old_used_wrap_counter", 21, 1, wrap),
          ] {
            let found = header.number(at: offset, width)
            try context.expect(
              found == expected, "\(name) is \(found) instead of \(expected) after \(count * step) descriptors: \(header.hexText())")
          }
        }
      }
    },
    CheckCase("inflight.packed-free", "When nothing is in flight every entry is in the list of free ones, once", section) { context in
      let tracked = try tracked(context, packed: true)
      for _ in 0..<5 { _ = try request(tracked) }
      try context.soon {
        try expectNothingInFlight(context, tracked)
        let header = tracked.header()
        var here = Int(header.number(at: 12, 2))
        try context.expect(
          header.number(at: 14, 2) == here, "free_head is \(here) and old_free_head \(header.number(at: 14, 2)): \(header.hexText())")
        var seen: Set<Int> = []
        while seen.count < entries {
          try context.expect(here < entries, "the list of free entries leads to \(here), after \(seen.count) of them")
          try context.expect(seen.insert(here).inserted, "the list of free entries comes to \(here) twice, after \(seen.count) of them")
          here = Int(tracked.entry(here).number(at: 2, 2))
        }
      }
    },
    CheckCase("inflight.packed-copies", "A request's entries hold copies of its descriptors, their number, and a growing counter", section)
    {
      context in
      let tracked = try tracked(context, packed: true)
      let client = tracked.client
      let step = client.pingDescriptorCount
      var last: UInt64 = 0
      for turn in 0..<4 {
        let offered = try client.offerPing(kick: false)
        let descriptors = try ringDescriptors(tracked, from: turn * step, step)
        client.ring.kick.signal()
        guard try client.takeUsed()?.head == offered else { throw CaseStop.fail("request \(turn + 1) was not completed") }
        var counter: UInt64 = 0
        try context.soon {
          // Its first entry is the one with the greatest counter.
          let heads = (0..<entries).filter { tracked.entry($0).number(at: 6, 2) != 0 }
          guard let first = heads.max(by: { tracked.entry($0).number(at: 8, 8) < tracked.entry($1).number(at: 8, 8) }) else {
            throw CaseStop.fail("no entry was ever used")
          }
          let head = tracked.entry(first)
          try context.expect(head.number(at: 6, 2) == step, "num is \(head.number(at: 6, 2)) instead of \(step): \(head.hexText())")
          try context.expect(turn == 0 || head.number(at: 8, 8) > last, "the counter does not grow: \(head.hexText())")
          counter = head.number(at: 8, 8)
          var here = first
          for (position, descriptor) in descriptors.enumerated() {
            let entry = tracked.entry(here)
            // Descriptor: address, length, id, flags. Entry from 16 on: id, flags, length, address. The id counts in the last only.
            let isSame =
              entry[24..<32].elementsEqual(descriptor[0..<8]) && entry[20..<24].elementsEqual(descriptor[8..<12])
              && (position + 1 < step || entry[16..<18].elementsEqual(descriptor[12..<14]))
              && (entry.number(at: 18, 2) ^ descriptor.number(at: 14, 2)) & 7 == 0
            try context.expect(isSame, "entry \(here) is \(entry.hexText()) for descriptor \(descriptor.hexText())")
            if position == step - 1 {
              try context.expect(head.number(at: 4, 2) == here, "last is \(head.number(at: 4, 2)) instead of \(here): \(head.hexText())")
            } else {
              here = Int(entry.number(at: 2, 2))
              try context.expect(here < entries, "next is \(here): \(entry.hexText())")
            }
          }
        }
        last = counter
      }
    },
    CheckCase(
      "inflight.packed-resubmits",
      "A request that a predecessor took from a packed ring is done again from its copies, though its descriptors were overwritten", section
    ) { context in
      let tracked = try tracked(context, packed: true, starts: false)
      let place = UInt16(tracked.client.pingDescriptorCount)
      let base = VringBase(availableSlot: place, availableWrap: true, usedSlot: place, usedWrap: true)
      try expectResubmission(context, tracked, 0, base: base.rawValue)
    },
  ]

  /// Bytes of ring entries.
  private static func ringDescriptors(_ tracked: Tracked, from slot: Int, _ count: Int) throws -> [[UInt8]] {
    let table = tracked.client.ring.queue.configuration.descriptors.rawValue
    return try (slot..<slot + count).map { slot in
      guard let bytes = tracked.client.arena.memory.bytes(at: GuestAddress(table + UInt64(16 * slot)), count: 16) else {
        throw CaseStop.fail("the probe lost its ring")
      }
      return bytes
    }
  }

  /// As `leaveSplitBehind`: the answer to the second chain lies over the descriptors of the first.
  private static func leavePackedBehind(_ tracked: Tracked, _ context: CheckContext) throws {
    let client = tracked.client
    let count = client.pingDescriptorCount
    let first = try client.offerPing(kick: false)
    let second = try client.offerPing(kick: false)
    try context.expect(first == 0, "the probe's first buffer id is \(first)")
    let copies = try ringDescriptors(tracked, from: 0, 2 * count)
    tracked.store(1, 2, 8)
    tracked.store(UInt64(entries), 2, 10)
    for offset in [12, 14, 16, 18] { tracked.store(UInt64(count), 2, offset) }
    for offset in [20, 21] { tracked.store(1, 1, offset) }
    for index in 0..<entries { tracked.store(UInt64(index + 1), 2, entry: index, 2) }
    for (index, copy) in copies.enumerated() {
      tracked.store(copy.number(at: 12, 2), 2, entry: index, 16)
      tracked.store(copy.number(at: 14, 2), 2, entry: index, 18)
      tracked.store(copy.number(at: 8, 4), 4, entry: index, 20)
      tracked.store(copy.number(at: 0, 8), 8, entry: index, 24)
    }
    for (turn, head) in [0, count].enumerated() {
      tracked.store(UInt64(head + count - 1), 2, entry: head, 4)
      tracked.store(UInt64(count), 2, entry: head, 6)
      tracked.store(UInt64(turn + 1), 8, entry: head, 8)
    }
    tracked.store(1, 1, entry: 0, 0)
    // The used descriptor of the second: its id, and both wrap bits.
    let table = client.ring.queue.configuration.descriptors.rawValue
    guard client.arena.memory.store(UInt64(0), at: GuestAddress(table)),
      client.arena.memory.store(UInt64(second) << 32 | 0x8080 << 48, at: GuestAddress(table + 8))
    else { throw CaseStop.fail("the probe lost its ring") }
    guard try client.takeUsed()?.head == second else { throw CaseStop.fail("the probe does not see its own used descriptor") }
  }
}

extension RingClient {
  /// Makes the small request available; its head.
  func offerPing(kick: Bool = true) throws -> UInt16 {
    guard let ping = Self.ping(device) else { throw CaseStop.notApplicable("the probe knows no request for this device") }
    return try offer(ping.request, answerByteCount: ping.answerByteCount, kick: kick)
  }

  /// Descriptors of the small request.
  var pingDescriptorCount: Int {
    guard let ping = Self.ping(device) else { return 1 }
    return (ping.request.isEmpty ? 0 : 1) + (ping.answerByteCount == 0 ? 0 : 1)
  }
}
