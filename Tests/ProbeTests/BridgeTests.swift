import Foundation
import Probe
import TestSupport
import Testing

private let programs = URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent().path

private func scratch() throws -> String {
  let path = NSTemporaryDirectory() + "probe-bridge-\(UUID().uuidString.prefix(8))"
  try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  return path
}

private func start(_ program: String, _ arguments: [String], output: Pipe? = nil) throws -> Process {
  let process = Process()
  process.executableURL = URL(fileURLWithPath: program)
  process.arguments = arguments
  process.standardOutput = output ?? FileHandle.nullDevice
  process.standardError = FileHandle.nullDevice
  process.standardInput = FileHandle.nullDevice
  try process.run()
  return process
}

/// Runs to its end; nil when it takes longer than a minute.
private func run(_ program: String, _ arguments: [String]) throws -> (code: Int32, output: String)? {
  let pipe = Pipe()
  let process = try start(program, arguments, output: pipe)
  let timer = DispatchWorkItem { process.terminate() }
  DispatchQueue.global().asyncAfter(deadline: .now() + 60, execute: timer)
  let bytes = pipe.fileHandleForReading.readDataToEndOfFile()
  process.waitUntilExit()
  if timer.isCancelled { return nil }
  timer.cancel()
  return (process.terminationStatus, String(decoding: bytes, as: UTF8.self))
}

private func waitFor(_ path: String) -> Bool {
  for _ in 0..<500 {
    if FileManager.default.fileExists(atPath: path) { return true }
    usleep(10_000)
  }
  return false
}

private func isThere(_ program: String) -> Bool { FileManager.default.isExecutableFile(atPath: program) }

@Suite("Probe: NBD, byte by byte")
struct NBDConversationTests {
  private static let greeting = Array("NBDMAGICIHAVEOPT".utf8) + [0, 3]

  private static func big<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    (0..<T.bitWidth / 8).reversed().map { UInt8(truncatingIfNeeded: value >> T(8 * $0)) }
  }

  private static func all(_ parts: [UInt8]...) -> [UInt8] { parts.flatMap { $0 } }

  private static func option(_ number: UInt32, _ data: [UInt8] = []) -> [UInt8] {
    all(Array("IHAVEOPT".utf8), big(number), big(UInt32(data.count)), data)
  }

  private static func optionReply(_ number: UInt32, _ type: UInt32, _ data: [UInt8] = []) -> [UInt8] {
    all(big(UInt64(0x3_e889_0455_65a9)), big(number), big(type), big(UInt32(data.count)), data)
  }

  private static func request(_ type: UInt16, _ offset: UInt64, _ length: UInt32, flags: UInt16 = 0, cookie: UInt64 = 7) -> [UInt8] {
    all(big(UInt32(0x2560_9513)), big(flags), big(type), big(cookie), big(offset), big(length))
  }

  private static let go = option(7, [0, 0, 0, 0, 0, 0])

  /// A disk of 1 MiB with everything.
  private static func conversation(_ bytes: [UInt8], readOnly: Bool = false) -> NBDConversation {
    var conversation = NBDConversation(
      NBDExport(name: "", byteCount: 1 << 20, blockSize: 512, flags: .init(rawValue: readOnly ? 0x83 : 0x1ED)))
    conversation.receive(bytes)
    return conversation
  }

  @Test("The greeting is that of fixed newstyle")
  func greets() {
    #expect(Self.conversation([]).output == Self.greeting)
  }

  @Test("Options are answered, unknown ones too, and GO begins the transmission with size, flags and block sizes")
  func options() {
    var talk = Self.conversation(Self.all(Self.agreed, Self.option(3), Self.option(99, [1]), Self.option(8), Self.go))
    #expect(talk.next() == nil)
    var expected = Self.all(Self.greeting, Self.optionReply(3, 2, [0, 0, 0, 0]), Self.optionReply(3, 1), Self.optionReply(99, 0x8000_0001))
    expected += Self.optionReply(8, 1)
    expected += Self.optionReply(7, 3, Self.all([0, 0], Self.big(UInt64(1 << 20)), Self.big(UInt16(0x1ED))))
    expected += Self.optionReply(7, 3, Self.all([0, 3], Self.big(UInt32(512)), Self.big(UInt32(4096)), Self.big(UInt32(32 << 20))))
    expected += Self.optionReply(7, 1)
    #expect(talk.output == expected)
    #expect(!talk.isOver)
  }

  @Test("The old way of naming the export works, with and without the 124 zeroes", arguments: [true, false])
  func exportName(noZeroes: Bool) {
    var talk = Self.conversation(Self.all([0, 0, 0, noZeroes ? 3 : 1], Self.option(1), Self.request(0, 512, 1024)))
    #expect(talk.next()?.byteCount == 1024)
    let tail = Self.all(Self.big(UInt64(1 << 20)), Self.big(UInt16(0x1ED)), [UInt8](repeating: 0, count: noZeroes ? 0 : 124))
    #expect(talk.output == Self.greeting + tail)
  }

  @Test("Bytes may come one at a time")
  func pieces() {
    var talk = Self.conversation([])
    var found: [NBDConversation.Request] = []
    let write = Self.request(1, 512, 512, flags: 1) + [UInt8](repeating: 0x5A, count: 512)
    for byte in Self.all(Self.agreed, Self.go, write, Self.request(3, 0, 0)) {
      talk.receive([byte])
      if let request = talk.next() { found.append(request) }
    }
    #expect(found.count == 2)
    #expect(found.first?.operation == .write)
    #expect(found.first?.flushesAfter == true)
    #expect(found.first?.data == [UInt8](repeating: 0x5A, count: 512))
    #expect(found.last?.operation == .flush)
  }

  private static let sector = [UInt8](repeating: 0, count: 512)
  private static let impossible: [(bytes: [UInt8], code: UInt32)] = [
    (request(0, 1 << 20, 512), 22), (all(request(1, 1 << 20, 512), sector), 28), (request(0, UInt64.max - 100, 512), 22),
    (request(0, 100, 512), 22), (request(0, 0, 0), 22), (request(9, 0, 512), 22), (request(0, 0, 512, flags: 0x100), 22),
    (request(3, 0, 512), 22), (request(4, 1 << 20, 512), 28),
  ]

  @Test("Requests that cannot be are refused with the right error, and the next one is served", arguments: impossible)
  func refusals(bytes: [UInt8], code: UInt32) {
    var talk = Self.conversation(Self.all(Self.agreed, Self.option(1), bytes, Self.request(0, 0, 512, cookie: 8)))
    #expect(talk.next()?.cookie == 8)
    #expect(talk.output.suffix(16) == Self.all(Self.big(UInt32(0x6744_6698)), Self.big(code), Self.big(UInt64(7))))
  }

  @Test("A read-only export refuses writes, and a structured read fails in a chunk")
  func readOnly() {
    let start = Self.all(Self.agreed, Self.option(8), Self.option(1))
    var talk = Self.conversation(Self.all(start, Self.request(1, 0, 512), Self.sector), readOnly: true)
    #expect(talk.next() == nil)
    #expect(talk.output.suffix(16) == Self.all(Self.big(UInt32(0x6744_6698)), Self.big(UInt32(1)), Self.big(UInt64(7))))
    var other = Self.conversation(start + Self.request(0, 1, 512))
    #expect(other.next() == nil)
    let chunk = Self.all(
      Self.big(UInt32(0x668E_33EF)), Self.big(UInt16(1)), Self.big(UInt16(0x8001)), Self.big(UInt64(7)), Self.big(UInt32(6)))
    #expect(other.output.suffix(26) == Self.all(chunk, Self.big(UInt32(22)), [0, 0]))
  }

  private static let agreed: [UInt8] = [0, 0, 0, 3]
  private static let noise: [[UInt8]] = [
    [0xFF, 0xFF, 0xFF, 0xFF], all(agreed, [UInt8](repeating: 0x41, count: 16)),
    all(agreed, Array("IHAVEOPT".utf8), big(UInt32(7)), big(UInt32.max)), all(agreed, option(1), [UInt8](repeating: 0, count: 28)),
    all(agreed, option(1), request(1, 0, 33 << 20)),
  ]

  @Test("What is no NBD ends the conversation", arguments: noise)
  func garbage(bytes: [UInt8]) {
    var talk = Self.conversation(bytes)
    #expect(talk.next() == nil)
    #expect(talk.isOver)
    #expect(talk.complaint != nil)
  }
}

@Suite("Probe: capture files and recordings")
struct FileFormatTests {
  @Test("Frames come back as they were written")
  func roundTrip() throws {
    let frames = [PcapFile.Frame(nanoseconds: 1_700_000_000_123_456_789, bytes: [1, 2, 3]), PcapFile.Frame(nanoseconds: 5, bytes: [])]
    #expect(try PcapFile.read(PcapFile.header + frames.flatMap(PcapFile.record), name: "x") == frames)
  }

  @Test("A file of a machine with the other byte order and of microseconds is read")
  func foreign() throws {
    let header: [UInt8] = [0xA1, 0xB2, 0xC3, 0xD4, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0, 0, 1]
    let record: [UInt8] = [0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0x77]
    #expect(try PcapFile.read(header + record, name: "x") == [PcapFile.Frame(nanoseconds: 2_000_003_000, bytes: [0x77])])
  }

  @Test("What is no capture file, or breaks off, is refused")
  func damaged() {
    let whole = PcapFile.header + PcapFile.record(PcapFile.Frame(nanoseconds: 0, bytes: [1, 2, 3, 4]))
    for bytes in [[], [1, 2, 3], [UInt8](repeating: 7, count: 40), Array(whole.dropLast()), Array(whole.prefix(30))] {
      #expect(throws: ProbeError.self) { try PcapFile.read(bytes, name: "x") }
    }
    let next: [UInt8] = [0x0A, 0x0D, 0x0D, 0x0A] + [UInt8](repeating: 0, count: 28)
    do {
      _ = try PcapFile.read(next, name: "x")
      Issue.record("accepted")
    } catch {
      #expect("\(error)".contains("editcap"))
    }
  }

  @Test("A recording is refused when a line is no message")
  func recordings() throws {
    let good =
      "martlet-recording 2\nconnection 1\n5 f 010000000100000000000000\n9 b 01000000050000000800000000000000000000ff event,memory:4096\n10 q 020000000100000000000000\n11 a 02000000050000000800000000000000000000ff\n"
    let recording = try Recording(good, name: "x")
    #expect(recording.connections.count == 1)
    #expect(recording.connections.first?.map(\.text) == good.split(separator: "\n").dropFirst(2).map(String.init))
    for bad in [
      "", "martlet-recording 3\n", "martlet-recording 1\n", "martlet-recording 1\n5 f 010000000100000000000000\n",
      "martlet-recording 1\nconnection 1\n5 x 010000000100000000000000\n", "martlet-recording 1\nconnection 1\n5 f 01\n",
      "martlet-recording 1\nconnection 1\n5 f 01000000010000000800000000\n",
      "martlet-recording 1\nconnection 1\n5 f 010000000100000000000000 memory:x\n",
    ] {
      #expect(throws: ProbeError.self) { try Recording(bad, name: "x") }
    }
  }
}

@Suite("Probe: bridge and record", .serialized)
struct BridgeTests {
  @Test("A disk behind the bridge holds what qemu-img writes over several connections", .enabled(if: isThere("/usr/bin/qemu-img")))
  func disk() throws {
    let place = try scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    var content = Data(count: 8 << 20)
    for index in stride(from: 0, to: 4 << 20, by: 7) { content[index] = UInt8(truncatingIfNeeded: index / 7) }
    try content.write(to: URL(fileURLWithPath: place + "/in.raw"))
    _ = FileManager.default.createFile(atPath: place + "/disk.raw", contents: Data(count: 8 << 20))
    let bridge = try start(
      programs + "/martlet-probe",
      ["bridge", "--nbd", place + "/n", "--", programs + "/martlet-block", "--socket-path", "{socket}", "--blk-file", place + "/disk.raw"])
    defer {
      bridge.terminate()
      bridge.waitUntilExit()
      #expect(bridge.terminationStatus == 0)
    }
    #expect(waitFor(place + "/n"))
    let url = "nbd+unix:///?socket=\(place)/n"
    let info = try #require(try run("/usr/bin/qemu-img", ["info", url]))
    #expect(info.output.contains("8 MiB"))
    let copied = try run("/usr/bin/qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", place + "/in.raw", url])
    #expect(copied?.code == 0)
    let same = try run("/usr/bin/qemu-img", ["compare", "-f", "raw", "-F", "raw", place + "/in.raw", url])
    #expect(same?.code == 0)
    #expect(try Data(contentsOf: URL(fileURLWithPath: place + "/disk.raw")) == content)
    if isThere("/usr/bin/nbdinfo") { #expect(try run("/usr/bin/nbdinfo", ["--size", url])?.output == "8388608\n") }
    if isThere("/usr/bin/nbdcopy") {
      #expect(try run("/usr/bin/nbdcopy", ["--connections=4", url, place + "/out.raw"])?.code == 0)
      #expect(try Data(contentsOf: URL(fileURLWithPath: place + "/out.raw")) == content)
    }
  }

  /// A stream of 8 MiB from one network namespace to another, through bridge and card; what was agreed on, and the longest frame.
  @Test(
    "A stream passes a tap whole, in large segments where card and tap may cut them, and in small ones where they may not",
    .enabled(if: geteuid() == 0 && isThere("/usr/bin/unshare") && isThere("/usr/bin/python3")), arguments: [true, false])
  func tap(offloads: Bool) throws {
    let place = try scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let script = """
      ip link set lo up && ip tuntap add t0 mode tap vnet_hdr && ip tuntap add t1 mode tap vnet_hdr || exit 99
      ip addr add 10.9.0.1/24 dev t0; ip link set t0 up
      \(programs)/martlet-probe bridge \(offloads ? "" : "--no-offload") --tap t1 --pcap-out \(place)/pcap -- \
        \(programs)/martlet-net --socket-path {socket} --tap t0 2> \(place)/said & bridge=$!
      unshare -n sleep 60 & other=$!
      for i in $(seq 100); do grep -q agreed \(place)/said && break; sleep 0.1; done
      ip link set t1 netns $other
      nsenter -t $other -n sh -c 'ip addr add 10.9.0.2/24 dev t1; ip link set t1 up'
      timeout 40 python3 -c '
      import socket, hashlib
      server = socket.create_server(("10.9.0.1", 7007))
      peer, _ = server.accept()
      digest, count = hashlib.sha256(), 0
      while data := peer.recv(1 << 16): digest.update(data); count += len(data)
      print(count, digest.hexdigest())' > \(place)/got & server=$!
      nsenter -t $other -n timeout 40 python3 -c '
      import socket, hashlib, time
      content = b"".join(hashlib.sha256(bytes([i & 255, i >> 8 & 255, i >> 16])).digest() for i in range(1 << 18))
      for attempt in range(100):
        try: peer = socket.create_connection(("10.9.0.1", 7007), 5); break
        except OSError: time.sleep(0.1)
      peer.sendall(content); peer.close()
      print(len(content), hashlib.sha256(content).hexdigest())' > \(place)/sent
      wait $server; kill -INT $bridge; wait $bridge; code=$?; kill $other; exit $code
      """
    let result = try #require(try run("/usr/bin/unshare", ["-n", "/bin/sh", "-c", script]))
    if result.code == 99 { return }
    #expect(result.code == 0)
    let sent = try String(contentsOfFile: place + "/sent", encoding: .utf8)
    #expect(sent.hasPrefix("8388608 "), "\(sent)")
    #expect(try String(contentsOfFile: place + "/got", encoding: .utf8) == sent)
    let said = try String(contentsOfFile: place + "/said", encoding: .utf8)
    #expect(said.contains(offloads ? "HOST_TSO4" : "agreed on: none"), "\(said)")
    let frames = try PcapFile.read(Array(try Data(contentsOf: URL(fileURLWithPath: place + "/pcap"))), name: "pcap")
    let longest = frames.map(\.bytes.count).max() ?? 0
    #expect(offloads ? longest > 1514 : longest == 1514, "\(longest)")
  }

  @Test("A recording between front end and back end replays without a difference, and with one against another back end")
  func record() throws {
    let place = try scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let recorder = try start(
      programs + "/martlet-probe",
      [
        "record", "--listen", place + "/r", "--output", place + "/talk", "--log", place + "/log", "--", programs + "/broken-backend",
        "{socket}", "block",
      ])
    #expect(waitFor(place + "/r"))
    let bench = ["bench", "--type", "blk", "--runtime", "0.1", "--no-syscalls", "--socket", place + "/r"]
    #expect(try run(programs + "/martlet-probe", bench)?.code == 0)
    recorder.terminate()
    recorder.waitUntilExit()
    #expect(recorder.terminationStatus == 0)
    let log = try String(contentsOfFile: place + "/log", encoding: .utf8)
    for part in ["SET_MEM_TABLE", "GET_FEATURES answered: 0x", "[memory:", "SET_VRING_KICK", "[event]", "the front end hung up"] {
      #expect(log.contains(part), "The log has no \(part)")
    }
    let again = ["replay", "--input", place + "/talk", "--", programs + "/broken-backend", "{socket}", "block"]
    let good = try #require(try run(programs + "/martlet-probe", again))
    #expect(good.code == 0, "\(good.output)")
    let other = try #require(try run(programs + "/martlet-probe", again + ["no-version1"]))
    #expect(other.code == 1)
    #expect(other.output.contains("GET_FEATURES"))
  }

  @Test("What the back end asks on its own channel is passed on, decoded, recorded, and answered in a replay")
  func channel() throws {
    let place = try scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    let recorder = try start(
      programs + "/martlet-probe",
      [
        "record", "--listen", place + "/r", "--output", place + "/talk", "--log", place + "/log", "--", programs + "/broken-backend",
        "{socket}", "block",
      ])
    #expect(waitFor(place + "/r"))
    let asking = ["check", "--type", "blk", "--only", "iotlb.translation", "--socket", place + "/r"]
    #expect(try run(programs + "/martlet-probe", asking)?.code == 0)
    recorder.terminate()
    recorder.waitUntilExit()
    let log = try String(contentsOfFile: place + "/log", encoding: .utf8)
    for part in ["SET_BACKEND_REQ_FD (wants a reply)  [socket]", "< channel: BACKEND_IOTLB_MSG: 0x", "IOTLB_MSG (wants a reply): 0x"] {
      #expect(log.contains(part), "The log has no \(part)")
    }
    #expect(try String(contentsOfFile: place + "/talk", encoding: .utf8).contains(" q 01000000"))
    let again = try #require(
      try run(programs + "/martlet-probe", ["replay", "--input", place + "/talk", "--", programs + "/broken-backend", "{socket}", "block"]))
    #expect(again.code == 0, "\(again.output)")
    #expect(again.output.contains("requests on the back end's own channel"), "\(again.output)")
  }

  @Test(
    "What a guest's firmware and qemu-storage-daemon say to each other is recorded, and replays",
    .enabled(if: isThere("/usr/bin/qemu-system-x86_64") && isThere("/usr/bin/qemu-storage-daemon")))
  func guest() throws {
    let place = try scratch()
    defer { try? FileManager.default.removeItem(atPath: place) }
    _ = FileManager.default.createFile(atPath: place + "/disk.raw", contents: Data(count: 1 << 20))
    let daemon = [
      "/usr/bin/qemu-storage-daemon", "--blockdev", "file,node-name=n,filename=\(place)/disk.raw", "--export",
      "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable=on",
    ]
    let recorder = try start(
      programs + "/martlet-probe",
      ["record", "--listen", place + "/r", "--output", place + "/talk", "--log", place + "/log", "--"] + daemon)
    #expect(waitFor(place + "/r"))
    let guest = try start(
      "/usr/bin/qemu-system-x86_64",
      [
        "-M", "q35,memory-backend=m", "-accel", "tcg", "-m", "64", "-object", "memory-backend-memfd,id=m,size=64M,share=on", "-nodefaults",
        "-display", "none", "-chardev", "socket,id=c,path=\(place)/r", "-device", "vhost-user-blk-pci,chardev=c,bootindex=0",
      ])
    var log = ""
    for _ in 0..<300 {
      usleep(100_000)
      log = (try? String(contentsOfFile: place + "/log", encoding: .utf8)) ?? ""
      if log.contains("SET_VRING_KICK") { break }
    }
    // It may have inherited a mask that keeps SIGTERM away.
    kill(guest.processIdentifier, SIGKILL)
    guest.waitUntilExit()
    recorder.terminate()
    recorder.waitUntilExit()
    #expect(log.contains("SET_VRING_KICK"), "The firmware did not start the disk: \(log)")
    let again = try #require(try run(programs + "/martlet-probe", ["replay", "--input", place + "/talk", "--"] + daemon))
    #expect(again.code == 0, "\(again.output)")
  }

  @Test("Bad input of bridge, record and replay ends with 2")
  func bad() throws {
    for words in [
      ["bridge"], ["bridge", "--nbd", "/tmp/x", "--tap", "t0"], ["bridge", "--tap", "t0", "--once"], ["record"], ["replay"],
      ["replay", "--input", "/dev/null"], ["replay", "--input", "/nowhere/x"], ["bridge", "--pcap-in", "/dev/null"],
      ["bridge", "--nbd", "/nowhere/x"], ["record", "--listen", "/nowhere/x"],
    ] {
      let code = ProbeProgram.run(["martlet-probe"] + words + ["--", programs + "/broken-backend", "{socket}", "block"])
      #expect(code == 2, "\(words)")
    }
  }
}
