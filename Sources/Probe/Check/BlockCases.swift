import Glibc
import HostSystem
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// Disks: configuration, requests, status codes, limits.
enum BlockCases {
  static let all: [CheckCase] = configuration + reading + errors + writing

  private static let configuration: [CheckCase] = [
    block("blk.capacity", "The capacity is not zero", "virtio 1.4, 5.2.4") { context in
      try context.expect(context.block.capacity > 0, "the capacity is 0 sectors")
    },
    block("blk.size-max", "SIZE_MAX is offered only with a size that is not zero", "virtio 1.4, 5.2.5") { context in
      try context.needs(.blockSizeMax)
      try context.expect(context.block.sizeMax > 0, "size_max is 0")
    },
    block("blk.seg-max", "SEG_MAX is offered only with a number that is not zero", "virtio 1.4, 5.2.5") { context in
      try context.needs(.blockSegMax)
      try context.expect(context.block.segmentMax > 0, "seg_max is 0")
    },
    block("blk.blk-size", "The logical block is a power of two of at least 512 bytes", "virtio 1.4, 5.2.4") { context in
      try context.needs(.blockBlockSize)
      let size = context.block.blockSize
      try context.expect(size >= 512 && size & (size - 1) == 0, "blk_size is \(size)")
    },
    block("blk.queues", "num_queues is at least one and not more than GET_QUEUE_NUM", "virtio 1.4, 5.2.4") { context in
      try context.needs(.blockMultipleQueues)
      let count = UInt64(context.block.queueCount)
      try context.expect(count >= 1, "num_queues is 0")
      if let told = context.offer.queueCount { try context.expect(count <= told, "num_queues is \(count), and GET_QUEUE_NUM says \(told)") }
    },
    block("blk.wce-needs-flush", "CONFIG_WCE is offered only with FLUSH", "virtio 1.4, 5.2.5") { context in
      try context.needs(.blockConfigWriteCache)
      try context.expect(context.offer.features.contains(.blockFlush), "FLUSH is missing")
    },
    block("blk.write-cache", "With CONFIG_WCE the write cache is switched off and on again", "virtio 1.4, 5.2.5") { context in
      try context.needs(.blockConfigWriteCache)
      try context.needs(.config)
      var link = try context.negotiated()
      try link.accept(context.offer.features.intersection([.version1, .blockConfigWriteCache, .blockFlush]))
      guard let space = try link.configuration(byteCount: BlockConfiguration.commonByteCount) else { return }
      let before = BlockConfiguration(decoding: space).writeback
      for value in [1 - min(before, 1), before] {
        try link.send(.setConfig(ConfigMessage(offset: 32, bytes: [value])))
        guard let space = try link.configuration(byteCount: BlockConfiguration.commonByteCount) else { return }
        let now = BlockConfiguration(decoding: space).writeback
        try context.expect(now == value, "writeback is \(now) after \(value) was written")
      }
    },
    block("blk.discard-limits", "DISCARD is offered only with limits that are not zero", "virtio 1.4, 5.2.5") { context in
      try context.needs(.blockDiscard)
      try context.expect(
        context.block.maxDiscardSectors > 0 && context.block.maxDiscardSegments > 0,
        "\(context.block.maxDiscardSectors) sectors, \(context.block.maxDiscardSegments) segments")
    },
    block("blk.write-zeroes-limits", "WRITE_ZEROES is offered only with limits that are not zero", "virtio 1.4, 5.2.5") { context in
      try context.needs(.blockWriteZeroes)
      try context.expect(
        context.block.maxWriteZeroesSectors > 0 && context.block.maxWriteZeroesSegments > 0,
        "\(context.block.maxWriteZeroesSectors) sectors, \(context.block.maxWriteZeroesSegments) segments")
    },
  ]

  private static let reading: [CheckCase] = [
    block("blk.read", "A read ends with status 0 and reports data and status as written", "virtio 1.4, 5.2.6") { context in
      let client = try context.client()
      let unit = unit(context)
      try expectStatus(0, try request(client, .read, 0, room: unit), "a read of \(unit) bytes", written: UInt32(unit + 1))
    },
    block("blk.read-fills", "A read writes every byte of its buffer", "virtio 1.4, 5.2.6") { context in
      let client = try context.client()
      let unit = unit(context)
      let first = try request(client, .read, 0, room: 8 * unit)
      // A byte that happens to be 0xA5 on the disk is so twice; one that is not written keeps what we put there.
      let run = first.bytes.dropLast().split(whereSeparator: { $0 != 0xA5 }).map(\.count).max() ?? 0
      if run >= 8 * unit { throw CaseStop.notApplicable("the disk's content cannot be told from untouched memory (a null device?)") }
      try context.expect(run < 64, "\(run) bytes in a row were not touched")
    },
    block("blk.read-large", "A read of 1 MiB ends with status 0", "virtio 1.4, 5.2.6") { context in
      let client = try context.client()
      let count = 1 << 20
      guard context.block.capacity * 512 >= count else { throw CaseStop.notApplicable("the disk is smaller") }
      let pieces = [Int](repeating: count / 16, count: 16)
      try expectStatus(
        0, try request(client, .read, 0, room: count, shape: RingClient.Shape(name: "16 pieces", writable: pieces)), "a read of 1 MiB",
        written: UInt32(count + 1))
    },
    block("blk.read-last", "The last block of the disk can be read", "virtio 1.4, 5.2.6") { context in
      let client = try context.client()
      let unit = unit(context)
      try expectStatus(0, try request(client, .read, context.block.capacity - UInt64(unit / 512), room: unit), "a read of the last block")
    },
    block("blk.seg-max-used", "A request with seg_max segments is done", "virtio 1.4, 5.2.4") { context in
      try context.needs(.blockSegMax)
      let unit = unit(context)
      let count = min(Int(context.block.segmentMax), 120)
      let client = try context.client(RingClient.Setup(ringSize: 128))
      guard context.block.capacity * 512 >= count * unit, count * unit < RingClient.bufferByteCount else {
        throw CaseStop.notApplicable("the disk is too small")
      }
      let shape = RingClient.Shape(name: "\(count) segments", writable: [Int](repeating: unit, count: count))
      try expectStatus(0, try request(client, .read, 0, room: count * unit, shape: shape), "a read in \(count) segments")
    },
    block("blk.id", "GET_ID gives 20 bytes, text padded with NUL", "virtio 1.4, 5.2.6") { context in
      let client = try context.client()
      let answer = try request(client, .getID, 0, room: 20)
      try expectStatus(0, answer, "GET_ID", written: 21)
      let text = answer.bytes.prefix(20).prefix { $0 != 0 }
      let rest = answer.bytes.prefix(20).dropFirst(text.count)
      try context.expect(
        text.allSatisfy { $0 >= 0x20 && $0 < 0x7F } && rest.allSatisfy { $0 == 0 }, "the id is \(answer.bytes.prefix(20).hexText())")
    },
    block("blk.flush", "A flush ends with status 0", "virtio 1.4, 5.2.6") { context in
      try context.needs(.blockFlush)
      let client = try context.client(RingClient.Setup(features: .blockFlush))
      try expectStatus(0, try request(client, .flush, 0, room: 0), "a flush", written: 1)
    },
    block("blk.status-last", "The status is the last writable byte, also when data and status share a descriptor", "virtio 1.4, 5.2.6") {
      context in
      let client = try context.client()
      let unit = unit(context)
      for pieces in [[unit + 1], [unit - 1, 2], [1, unit]] {
        let answer = try request(client, .read, 0, room: unit, shape: RingClient.Shape(name: "cut at \(pieces)", writable: pieces))
        try expectStatus(0, answer, "a read whose buffer is cut at \(pieces)")
      }
    },
    block("blk.many", "Thirty requests in flight at once are each completed once", "virtio 1.4, 2.7") { context in
      let client = try context.client(RingClient.Setup(ringSize: 128))
      var outstanding: Set<UInt16> = []
      for _ in 0..<30 { outstanding.insert(try client.offer(BlockWire.header(.read, 0), answerByteCount: unit(context) + 1)) }
      while !outstanding.isEmpty {
        guard let used = try client.takeUsed() else { throw CaseStop.fail("\(outstanding.count) of 30 requests were not completed") }
        guard outstanding.remove(used.head) != nil else { throw CaseStop.fail("chain \(used.head) was completed twice") }
      }
    },
  ]

  private static let errors: [CheckCase] = [
    status("blk.unknown", "An unknown request type ends with UNSUPP", 2, .init(rawValue: 0x7777), room: 512),
    block("blk.beyond", "A read beyond the end of the disk ends with IOERR", "virtio 1.4, 5.2.6") { context in
      try expectStatus(
        1, try request(try context.client(), .read, context.block.capacity, room: unit(context)), "a read behind the last block")
    },
    block("blk.across-end", "A read across the end of the disk ends with IOERR", "virtio 1.4, 5.2.6") { context in
      let unit = unit(context)
      try expectStatus(
        1, try request(try context.client(), .read, context.block.capacity - UInt64(unit / 512), room: 2 * unit), "a read across the end")
    },
    block("blk.wraps", "A sector number whose byte offset wraps around ends with IOERR", "virtio 1.4, 5.2.6") { context in
      let client = try context.client()
      for sector in [UInt64.max, UInt64.max - 7, 1 << 55, 1 << 63] as [UInt64] {
        try expectStatus(1, try request(client, .read, sector, room: unit(context)), "a read at sector 0x\(String(sector, radix: 16))")
      }
    },
    block("blk.unaligned", "A read whose length is no multiple of 512 ends with IOERR", "virtio 1.4, 5.2.6") { context in
      try expectStatus(1, try request(try context.client(), .read, 0, room: 700), "a read of 700 bytes")
    },
    block("blk.read-only", "A write to a read-only disk ends with IOERR", "virtio 1.4, 5.2.6") { context in
      guard context.offer.features.contains(.blockReadOnly) else { throw CaseStop.notApplicable("the disk is writable") }
      let client = try context.client(RingClient.Setup(features: .blockReadOnly))
      try expectStatus(1, try request(client, .write, 0, body: [UInt8](repeating: 0, count: 512)), "a write")
    },
    block("blk.discard-flags", "A discard with the unmap flag ends with UNSUPP", "virtio 1.4, 5.2.6") { context in
      try context.needs(.blockDiscard)
      let client = try context.client(RingClient.Setup(features: .blockDiscard))
      try expectStatus(2, try request(client, .discard, 0, body: BlockWire.segment(0, 8, 1)), "a discard with flag 1")
    },
    block("blk.write-zeroes-flags", "A write-zeroes with an unknown flag ends with UNSUPP", "virtio 1.4, 5.2.6") { context in
      try context.needs(.blockWriteZeroes)
      let client = try context.client(RingClient.Setup(features: .blockWriteZeroes))
      try expectStatus(2, try request(client, .writeZeroes, 0, body: BlockWire.segment(0, 8, 0x10)), "a write-zeroes with flag 0x10")
    },
    block("blk.discard-beyond", "A discard beyond the end of the disk ends with IOERR", "virtio 1.4, 5.2.6") { context in
      try context.needs(.blockDiscard)
      let client = try context.client(RingClient.Setup(features: .blockDiscard))
      try expectStatus(
        1, try request(client, .discard, 0, body: BlockWire.segment(context.block.capacity, 8)), "a discard behind the last block")
    },
    block("blk.discard-large", "A discard of more than max_discard_sectors ends with IOERR", "virtio 1.4, 5.2.6") { context in
      try context.needs(.blockDiscard)
      let limit = context.block.maxDiscardSectors
      guard limit < UInt32.max else { throw CaseStop.notApplicable("there is no limit") }
      let client = try context.client(RingClient.Setup(features: .blockDiscard))
      // Behind the disk as well, so that a device that does not check destroys nothing.
      try expectStatus(
        1, try request(client, .discard, 0, body: BlockWire.segment(context.block.capacity, limit + 1)), "a discard of \(limit + 1) sectors"
      )
    },
    block("blk.no-status", "A request without room for a status does not end the device", "virtio 1.4, 5.2.6") { context in
      do {
        let client = try context.client()
        _ = try client.offer(BlockWire.header(.read, 0), answerByteCount: 0)
        _ = try? client.takeUsed(within: .milliseconds(100))
      }
      try context.client().ping()
    },
    block("blk.short-header", "A request shorter than its header does not end the device", "virtio 1.4, 5.2.6") { context in
      do {
        let client = try context.client()
        _ = try client.offer([0, 0, 0, 0], answerByteCount: 1)
        _ = try? client.takeUsed(within: .milliseconds(100))
      }
      try context.client().ping()
    },
  ]

  private static let writing: [CheckCase] = [
    block("blk.write", "What is written is what is read", "virtio 1.4, 5.2.6") { context in
      try context.needsWriting()
      let client = try context.client()
      let unit = unit(context)
      try context.needsRoom(7 * unit)
      let pattern = (0..<4 * unit).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 >> 8) }
      let sector = UInt64(unit / 512) * 3
      try expectStatus(0, try request(client, .write, sector, body: pattern), "a write", written: 1)
      let back = try request(client, .read, sector, room: pattern.count)
      try expectStatus(0, back, "the read after it")
      let difference = zip(pattern, back.bytes).enumerated().first { $0.element.0 != $0.element.1 }
      if context.isNull(back) { throw CaseStop.notApplicable("the device keeps nothing (a null device?)") }
      if let difference {
        throw CaseStop.fail(
          "byte \(difference.offset) is \(difference.element.1.hexText) and was written as \(difference.element.0.hexText)")
      }
    },
    block("blk.write-pieces", "A write cut into odd pieces arrives whole", "virtio 1.4, 2.7.4") { context in
      try context.needsWriting()
      let client = try context.client()
      let unit = unit(context)
      try context.needsRoom(2 * unit)
      let pattern = (0..<2 * unit).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ 3) }
      let shape = RingClient.Shape(name: "odd pieces", readable: [5, 11 + 13, 1, 500])
      try expectStatus(0, try request(client, .write, 0, body: pattern, shape: shape), "a write in odd pieces", written: 1)
      let back = try request(client, .read, 0, room: pattern.count)
      if context.isNull(back) { throw CaseStop.notApplicable("the device keeps nothing (a null device?)") }
      try context.expect(Array(back.bytes.prefix(pattern.count)) == pattern, "the data read differs")
    },
    block("blk.write-beyond", "A write beyond the end of the disk ends with IOERR", "virtio 1.4, 5.2.6") { context in
      try context.needsWriting()
      try expectStatus(
        1, try request(try context.client(), .write, context.block.capacity, body: [UInt8](repeating: 0, count: unit(context))),
        "a write behind the last block")
    },
    block("blk.write-zeroes", "Zeroed blocks read as zero, and their neighbours stay", "virtio 1.4, 5.2.6") { context in
      try context.needsWriting()
      try context.needs(.blockWriteZeroes)
      let client = try context.client(RingClient.Setup(features: .blockWriteZeroes))
      let unit = unit(context)
      try context.needsRoom(3 * unit)
      let sectors = UInt64(unit / 512)
      let pattern = [UInt8](repeating: 0x5A, count: 3 * unit)
      try expectStatus(0, try request(client, .write, 0, body: pattern), "a write")
      try expectStatus(
        0, try request(client, .writeZeroes, 0, body: BlockWire.segment(sectors, UInt32(sectors))), "a write-zeroes", written: 1)
      let back = try request(client, .read, 0, room: 3 * unit)
      if context.isNull(back) { throw CaseStop.notApplicable("the device keeps nothing (a null device?)") }
      let middle = back.bytes[unit..<2 * unit]
      try context.expect(middle.allSatisfy { $0 == 0 }, "the zeroed block reads \(middle.hexText(limit: 8))")
      try context.expect(
        back.bytes[..<unit].allSatisfy { $0 == 0x5A } && back.bytes[(2 * unit)..<(3 * unit)].allSatisfy { $0 == 0x5A },
        "a neighbouring block changed")
    },
    block("blk.discard", "A discard ends with status 0", "virtio 1.4, 5.2.6") { context in
      try context.needsWriting()
      try context.needs(.blockDiscard)
      let client = try context.client(RingClient.Setup(features: .blockDiscard))
      let sectors = max(UInt32(unit(context) / 512), context.block.discardSectorAlignment)
      try context.needsRoom(Int(sectors) * 512)
      try expectStatus(
        0, try request(client, .discard, 0, body: BlockWire.segment(0, sectors)), "a discard of \(sectors) sectors", written: 1)
    },
    block("blk.survives-reconnect", "What was written is there for the next front end", "virtio 1.4, 5.2.6") { context in
      try context.needsWriting()
      let unit = unit(context)
      let pattern = (0..<unit).map { UInt8(truncatingIfNeeded: $0 &* 13 &+ 1) }
      do { try expectStatus(0, try request(try context.client(), .write, 0, body: pattern), "a write") }
      let back = try request(try context.client(), .read, 0, room: unit)
      if context.isNull(back) { throw CaseStop.notApplicable("the device keeps nothing (a null device?)") }
      try context.expect(Array(back.bytes.prefix(unit)) == pattern, "another content is read")
    },
  ]

  // MARK: Pieces

  private static func block(_ id: String, _ sentence: String, _ section: String, _ body: @escaping @Sendable (CheckContext) throws -> Void)
    -> CheckCase
  {
    CheckCase(id, sentence, section) { context in
      guard context.device == .block else { throw CaseStop.notApplicable("the device is no disk") }
      guard context.offer.configuration != nil else { throw CaseStop.notApplicable("it gives no configuration") }
      try body(context)
    }
  }

  private static func status(_ id: String, _ sentence: String, _ expected: UInt8, _ type: BlockRequestType, room: Int) -> CheckCase {
    block(id, sentence, "virtio 1.4, 5.2.6") { context in
      try expectStatus(expected, try request(try context.client(), type, 0, room: room), "request type \(type.rawValue)")
    }
  }

  /// The smallest transfer the disk takes, in bytes.
  private static func unit(_ context: CheckContext) -> Int {
    let size = context.offer.features.contains(.blockBlockSize) ? Int(context.block.blockSize) : 512
    return (512...65536).contains(size) ? size : 512
  }

  static func request(
    _ client: RingClient, _ type: BlockRequestType, _ sector: UInt64, body: [UInt8] = [], room: Int = 0, shape: RingClient.Shape = .plain
  ) throws -> RingClient.Answer {
    var shape = shape
    if shape.readable.isEmpty, !body.isEmpty { shape.readable = [16] }
    if shape.writable.isEmpty, room > 0 { shape.writable = [room] }
    return try client.exchange(BlockWire.header(type, sector) + body, answerByteCount: room + 1, shape: shape)
  }

  private static func expectStatus(_ expected: UInt8, _ answer: RingClient.Answer, _ what: String, written: UInt32? = nil) throws {
    let status = answer.bytes.last ?? 0xFF
    guard status == expected else {
      throw CaseStop.fail("\(what) ends with status \(status == 0xA5 ? "not written" : String(status)) instead of \(expected)")
    }
    guard answer.written <= answer.bytes.count else {
      throw CaseStop.fail("\(what) reports \(answer.written) bytes written into room for \(answer.bytes.count)")
    }
    if let written, answer.written != written {
      throw CaseStop.fail("\(what) reports \(answer.written) bytes written instead of \(written)")
    }
  }
}

extension CheckContext {
  /// For requests to a part of the disk that a very small one does not have.
  func needsRoom(_ byteCount: Int) throws {
    guard block.capacity >= UInt64(byteCount) / 512 else {
      throw CaseStop.notApplicable("it needs \(byteCount) bytes, and the disk has \(block.capacity) sectors")
    }
  }

  /// Whether a read left its buffer alone, or gave zeros only, after something else was written: devices for measuring.
  func isNull(_ answer: RingClient.Answer) -> Bool {
    answer.bytes.dropLast().allSatisfy { $0 == 0xA5 } || answer.bytes.dropLast().allSatisfy { $0 == 0 }
  }
}
