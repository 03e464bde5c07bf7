import Glibc
@testable import Probe

// What the probe reads: recordings, captures, and the bytes of NBD clients.

let recordings = Target(
  name: "recordings", about: "recordings of conversations, and captures of frames",
  seeds: {
    let text = """
      martlet-recording 2
      connection
      0 f 010000000100000000000000
      12 b 0100000005000000080000000600007001000000
      50 q 020000000900000000000000
      51 a 0200000005000000080000000000000000000000
      99 f 0d00000001000000080000000000000000000000 event
      100 f 050000000100000028000000010000000000000000000000000000000000010000000000000000000000000000000000 memory:65536,other

      """
    let frames = [PcapFile.Frame(nanoseconds: 1_500_000_001, bytes: Array(0..<60)), PcapFile.Frame(nanoseconds: 5, bytes: [])]
    return [Array(text.utf8), PcapFile.header + frames.flatMap { PcapFile.record($0) }]
  }, words: ["martlet-recording 1\n", "martlet-recording 2\n", "connection\n", "memory:", "event", "socket", " f ", " b ", " q ", " a "],
  run: { script in
    let bytes = script.rest()
    let text = String(decoding: bytes, as: UTF8.self)
    if let recording = try? Recording(text, name: "input") {
      let written = Recording.firstLine + "\n" + recording.connections.map { "connection\n" + $0.map { $0.text + "\n" }.joined() }.joined()
      guard let again = try? Recording(written, name: "again") else { return demand(false, "what we write we cannot read: \(written)") }
      demand(again.connections.map { $0.map(\.text) } == recording.connections.map { $0.map(\.text) }, "a recording changes on its way")
    }
    if let frames = try? PcapFile.read(bytes, name: "input") {
      demand(frames.reduce(0) { $0 + $1.bytes.count } <= bytes.count, "frames are longer than their file")
      let written = PcapFile.header + frames.flatMap { PcapFile.record($0) }
      guard let again = try? PcapFile.read(written, name: "again") else { return demand(false, "what we write we cannot read") }
      demand(again.map(\.bytes) == frames.map(\.bytes), "frames change on their way")
    }
  })

let nbdClients = Target(
  name: "nbd", about: "an NBD client's bytes, in pieces of any size",
  seeds: {
    func big(_ value: UInt64, _ count: Int) -> [UInt8] { (0..<count).reversed().map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) } }
    func option(_ number: UInt64, _ data: [UInt8]) -> [UInt8] {
      big(0x4948_4156_454F_5054, 8) + big(number, 4) + big(UInt64(data.count), 4) + data
    }
    func request(_ type: UInt64, _ offset: UInt64, _ length: UInt64) -> [UInt8] {
      big(0x2560_9513, 4) + big(0, 2) + big(type, 2) + big(7, 8) + big(offset, 8) + big(length, 4)
    }
    let go = option(7, big(0, 4) + big(0, 2))
    let data = [UInt8](repeating: 1, count: 512)
    let all: [UInt8] = request(0, 512, 512) + request(1, 512, 512) + data + request(3, 0, 0) + request(4, 512, 512) + request(6, 512, 512)
    let first: [UInt8] = [0] + big(3, 4) + go + all + request(2, 0, 0)
    let second: [UInt8] = [7] + big(1, 4) + option(8, []) + option(3, []) + go + request(0, 0, 1024)
    let third: [UInt8] = [3] + big(0, 4) + option(1, []) + request(4, 1 << 20, 512)
    let fourth: [UInt8] = [1] + big(3, 4) + option(5, []) + option(2, [])
    // At and beyond the end of the disk, and of all numbers.
    let edges =
      [((1 << 20) - 512, 512), ((1 << 20) - 512, 1024), (1 << 20, 512), (.max - 511, 512), (.max - 1023, 2048)] as [(UInt64, UInt64)]
    let fifth: [UInt8] = [7] + big(1, 4) + go + edges.flatMap { request(0, $0.0, $0.1) + request(4, $0.0, $0.1) }
    return [first, second, third, fourth, fifth]
  }, words: ["IHAVEOPT", "NBDMAGIC"],
  run: { script in
    let pace = script.byte()
    let bytes = script.rest()
    let disk = NBDExport(name: "", byteCount: 1 << 20, blockSize: 512, flags: NBDWire.TransmissionFlags(rawValue: 0x6D | UInt16(pace & 2)))
    func converse(_ piece: Int) -> (requests: [NBDConversation.Request], output: [UInt8], complaint: String?) {
      var conversation = NBDConversation(disk)
      var requests: [NBDConversation.Request] = []
      var done = 0
      while done < bytes.count, !conversation.isOver {
        let count = min(piece, bytes.count - done)
        conversation.receive(bytes[done..<done + count])
        done += count
        while let request = conversation.next() { requests.append(request) }
      }
      return (requests, conversation.output, conversation.complaint)
    }
    let whole = converse(max(1, bytes.count))
    for request in whole.requests {
      demand(request.offset <= disk.byteCount && request.byteCount <= disk.byteCount - request.offset, "a request beyond the disk")
      demand(request.byteCount <= 32 << 20 && request.byteCount % 512 == 0, "a request of \(request.byteCount) bytes")
      demand(request.operation != .write || UInt64(request.data.count) == request.byteCount, "a write without its data")
      demand(request.operation == .read || request.operation == .flush || pace & 2 == 0, "a read-only disk is changed")
    }
    demand(whole.output.count <= 256 + 32 * bytes.count, "\(whole.output.count) bytes answer \(bytes.count)")
    let pieces = converse(Int(pace) + 1)
    demand(
      pieces.requests.count == whole.requests.count && pieces.output == whole.output && pieces.complaint == whole.complaint,
      "what a client says means something else in pieces")
  })
