import Glibc
import HostSystem

/// What a connection may know of the disk.
package struct NBDExport {
  let name: String
  let byteCount: UInt64
  let blockSize: UInt64
  let flags: NBDWire.TransmissionFlags

  package init(name: String, byteCount: UInt64, blockSize: UInt64, flags: NBDWire.TransmissionFlags) {
    self.name = name
    self.byteCount = byteCount
    self.blockSize = blockSize
    self.flags = flags
  }

  var isReadOnly: Bool { flags.contains(.readOnly) }
}

/// One client: bytes in, requests out; answers in, bytes out. Knows no socket, so that it can be tested with bytes.
package struct NBDConversation {
  private enum State {
    case flags, options, transmission, over
  }

  /// A request that the disk has to do.
  package struct Request {
    package var operation: BlockOperation
    package var offset: UInt64
    package var byteCount: UInt64
    package var data: [UInt8]
    package var flushesAfter: Bool
    package var cookie: UInt64
  }

  private let export: NBDExport
  private var state = State.flags
  private var input: [UInt8] = []
  private var start = 0
  /// What the client is to be sent.
  package var output: [UInt8]
  private var hasStructuredReplies = false
  private var wantsNoZeroes = false
  /// Nothing more is read; what is in `output` is sent, and the connection ends.
  package var isOver: Bool { state == .over }
  /// Why it ended, when that is a fault of the client.
  package private(set) var complaint: String?

  package init(_ export: NBDExport) {
    self.export = export
    output = NBDWire.bytes(NBDWire.greeting) + NBDWire.bytes(NBDWire.option) + NBDWire.bytes(NBDWire.fixedNewstyle | NBDWire.noZeroes)
  }

  private mutating func end(_ complaint: String?) {
    state = .over
    self.complaint = complaint
  }

  package mutating func receive(_ bytes: some Sequence<UInt8>) { input.append(contentsOf: bytes) }

  private var available: Int { input.count - start }

  private mutating func take(_ count: Int) -> [UInt8] {
    let piece = Array(input[start..<start + count])
    start += count
    if start > 1 << 20 || start == input.count {
      input.removeFirst(start)
      start = 0
    }
    return piece
  }

  /// The next request that is there whole; nil when bytes are missing or the conversation is over.
  package mutating func next() -> Request? {
    // Bounded: every turn takes bytes, or ends.
    while true {
      switch state {
      case .over: return nil
      case .flags:
        guard available >= 4 else { return nil }
        let flags = take(4).bigEndian(at: 0, 4)
        guard flags & ~3 == 0 else { return finish("the client's flags are 0x\(String(flags, radix: 16))") }
        wantsNoZeroes = flags & 2 != 0
        state = .options
      case .options:
        guard takeOption() else { return nil }
      case .transmission:
        guard available >= NBDWire.requestByteCount else { return nil }
        let head = Array(input[start..<start + NBDWire.requestByteCount])
        let length = head.bigEndian(at: 24, 4)
        guard head.bigEndian(at: 0, 4) == UInt64(NBDWire.request) else { return finish("a request does not begin with its magic number") }
        let isWrite = head.bigEndian(at: 6, 2) == UInt64(NBDWire.Command.write.rawValue)
        guard !isWrite || length <= NBDWire.longestTransfer else { return finish("a write of \(length) bytes is longer than 32 MiB") }
        let payload = isWrite ? Int(length) : 0
        guard available >= NBDWire.requestByteCount + payload else { return nil }
        _ = take(NBDWire.requestByteCount)
        if let request = judge(head, take(payload)) { return request }
      }
    }
  }

  private mutating func finish(_ complaint: String?) -> Request? {
    end(complaint)
    return nil
  }

  // MARK: Options

  /// False when bytes are missing or the conversation is over.
  private mutating func takeOption() -> Bool {
    guard available >= NBDWire.optionByteCount else { return false }
    let head = Array(input[start..<start + NBDWire.optionByteCount])
    let length = Int(head.bigEndian(at: 12, 4))
    guard head.bigEndian(at: 0, 8) == NBDWire.option else {
      end("an option does not begin with IHAVEOPT")
      return false
    }
    guard length <= NBDWire.longestOption else {
      end("an option of \(length) bytes is too long")
      return false
    }
    guard available >= NBDWire.optionByteCount + length else { return false }
    _ = take(NBDWire.optionByteCount)
    let number = UInt32(head.bigEndian(at: 8, 4))
    answer(number, take(length))
    return state != .over
  }

  private mutating func reply(_ option: UInt32, _ type: NBDWire.OptionReply, _ data: [UInt8] = []) {
    output += NBDWire.bytes(NBDWire.optionReply) + NBDWire.bytes(option) + NBDWire.bytes(type.rawValue)
    output += NBDWire.bytes(UInt32(data.count)) + data
  }

  private mutating func answer(_ number: UInt32, _ data: [UInt8]) {
    switch NBDWire.Option(rawValue: number) {
    case .exportName?:
      // The one option whose only refusal is to hang up.
      guard data.elementsEqual(export.name.utf8) else { return end("it asks for another export") }
      output += NBDWire.bytes(export.byteCount) + NBDWire.bytes(export.flags.rawValue)
      if !wantsNoZeroes { output += [UInt8](repeating: 0, count: 124) }
      state = .transmission
    case .abort?:
      reply(number, .acknowledge)
      end(nil)
    case .list?:
      guard data.isEmpty else { return reply(number, .invalid) }
      reply(number, .server, NBDWire.bytes(UInt32(export.name.utf8.count)) + Array(export.name.utf8))
      reply(number, .acknowledge)
    case .info?, .go?: inform(number, data)
    case .structuredReply?:
      guard data.isEmpty else { return reply(number, .invalid) }
      hasStructuredReplies = true
      reply(number, .acknowledge)
    case .startTLS?: reply(number, .policy)
    case nil: reply(number, .unsupported)
    }
  }

  private mutating func inform(_ number: UInt32, _ data: [UInt8]) {
    let nameLength = Int(data.bigEndian(at: 0, 4))
    guard data.count >= 6, nameLength <= data.count - 6 else { return reply(number, .invalid) }
    let asked = Int(data.bigEndian(at: 4 + nameLength, 2))
    guard data.count == 6 + nameLength + 2 * asked else { return reply(number, .invalid) }
    guard data[4..<4 + nameLength].elementsEqual(export.name.utf8) else { return reply(number, .unknown) }
    reply(number, .info, NBDWire.bytes(NBDWire.infoExport) + NBDWire.bytes(export.byteCount) + NBDWire.bytes(export.flags.rawValue))
    var sizes = NBDWire.bytes(NBDWire.infoBlockSize) + NBDWire.bytes(UInt32(export.blockSize))
    sizes += NBDWire.bytes(UInt32(max(4096, export.blockSize))) + NBDWire.bytes(UInt32(NBDWire.longestTransfer))
    reply(number, .info, sizes)
    reply(number, .acknowledge)
    if number == NBDWire.Option.go.rawValue { state = .transmission }
  }

  // MARK: Requests

  /// A request for the disk; nil when it was answered here.
  private mutating func judge(_ head: [UInt8], _ payload: [UInt8]) -> Request? {
    let flags = UInt16(head.bigEndian(at: 4, 2))
    let cookie = head.bigEndian(at: 8, 8)
    let offset = head.bigEndian(at: 16, 8)
    let length = head.bigEndian(at: 24, 4)
    guard let command = NBDWire.Command(rawValue: UInt16(head.bigEndian(at: 6, 2))) else {
      return self.refuse(cookie, .invalid)
    }
    let isStructuredRead = command == .read && hasStructuredReplies
    func refuse(_ failure: NBDWire.Failure) -> Request? { self.refuse(cookie, failure, structured: isStructuredRead) }
    if command == .disconnect { return finish(nil) }
    var allowed: UInt16 = NBDWire.commandForceUnitAccess
    if command == .writeZeroes { allowed |= NBDWire.commandNoHole }
    if isStructuredRead { allowed |= NBDWire.commandDontFragment }
    guard flags & ~allowed == 0 else { return refuse(.invalid) }
    let force = flags & NBDWire.commandForceUnitAccess != 0
    if command == .flush {
      guard offset == 0, length == 0, export.flags.contains(.flush) else { return refuse(.invalid) }
      return Request(operation: .flush, offset: 0, byteCount: 0, data: [], flushesAfter: false, cookie: cookie)
    }
    let (end, overflow) = offset.addingReportingOverflow(length)
    guard !overflow, end <= export.byteCount else { return refuse(command == .read ? .invalid : .noSpace) }
    guard command == .read || !export.isReadOnly else { return refuse(.notPermitted) }
    guard length > 0, offset % export.blockSize == 0, length % export.blockSize == 0 else { return refuse(.invalid) }
    var request = Request(operation: .read, offset: offset, byteCount: length, data: payload, flushesAfter: force, cookie: cookie)
    switch command {
    case .read:
      guard length <= NBDWire.longestTransfer else { return refuse(.invalid) }
      request.flushesAfter = false
    case .write: request.operation = .write
    case .trim:
      guard export.flags.contains(.trim) else { return refuse(.notSupported) }
      request.operation = .discard
    case .writeZeroes:
      guard export.flags.contains(.writeZeroes) else { return refuse(.notSupported) }
      request.operation = .writeZeroes(mayUnmap: flags & NBDWire.commandNoHole == 0)
    case .disconnect, .flush: return refuse(.invalid)
    }
    return request
  }

  private mutating func refuse(_ cookie: UInt64, _ failure: NBDWire.Failure, structured: Bool = false) -> Request? {
    fail(cookie, failure, structured: structured)
    return nil
  }

  private mutating func fail(_ cookie: UInt64, _ failure: NBDWire.Failure, structured: Bool) {
    if structured {
      chunk(NBDWire.chunkError, cookie, NBDWire.bytes(failure.rawValue) + NBDWire.bytes(UInt16(0)))
    } else {
      output += NBDWire.bytes(NBDWire.simpleReply) + NBDWire.bytes(failure.rawValue) + NBDWire.bytes(cookie)
    }
  }

  private mutating func chunk(_ type: UInt16, _ cookie: UInt64, _ payload: [UInt8]) {
    output += NBDWire.bytes(NBDWire.structuredReply) + NBDWire.bytes(NBDWire.chunkDone) + NBDWire.bytes(type)
    output += NBDWire.bytes(cookie) + NBDWire.bytes(UInt32(payload.count)) + payload
  }

  /// The disk has done it.
  mutating func answer(_ job: BlockPump.Job) {
    let isStructured = job.operation == .read && hasStructuredReplies
    guard job.status == 0 else { return fail(job.cookie, job.status == 2 ? .notSupported : .inputOutput, structured: isStructured) }
    if isStructured {
      output.reserveCapacity(output.count + job.data.count + 32)
      output += NBDWire.bytes(NBDWire.structuredReply) + NBDWire.bytes(NBDWire.chunkDone) + NBDWire.bytes(NBDWire.chunkData)
      output += NBDWire.bytes(job.cookie) + NBDWire.bytes(UInt32(job.data.count + 8)) + NBDWire.bytes(job.offset)
    } else {
      output += NBDWire.bytes(NBDWire.simpleReply) + NBDWire.bytes(UInt32(0)) + NBDWire.bytes(job.cookie)
    }
    if job.operation == .read { output += job.data }
  }
}
