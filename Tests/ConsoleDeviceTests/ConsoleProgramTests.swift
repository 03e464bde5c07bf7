import ConsoleDevice
import Foundation
import HostSystem
import TestSupport
import Testing
import VMMemory
import VhostUser
import VirtioQueue
import VirtioSpec

/// The console program as a process of its own, and a driver at its queues.
final class ConsoleRig {
  let process = Process()
  let front: TestFrontEnd
  let receive: TestQueue
  let transmit: TestQueue
  let errors = Pipe()
  private let directory: String

  init(
    _ arguments: [String], input: FileHandle = .nullDevice, output: FileHandle = .nullDevice,
    wanting: (FeatureSet) -> FeatureSet = { $0.subtracting(.packedRing) }
  ) throws {
    directory = temporaryPath("console")
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    process.executableURL = DeviceProcess.programs.appendingPathComponent("martlet-console")
    process.arguments = ["--socket-path=\(directory)/s"] + arguments
    process.standardInput = input
    process.standardOutput = output
    process.standardError = errors
    try process.run()
    let end = MonotonicTime.now.advanced(by: .seconds(10))
    var socket: OwnedFD?
    while socket == nil, MonotonicTime.now < end {
      if let fd = try? UnixSocket.connect(to: "\(directory)/s") { socket = consume fd } else { usleep(2000) }
    }
    front = try TestFrontEnd(unwrap(socket), memoryByteCount: 16 << 20, wanting: wanting)
    receive = try front.startQueue(size: 64)
    transmit = try front.startQueue(size: 64)
  }

  deinit {
    if process.isRunning {
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
    }
    try? FileManager.default.removeItem(atPath: directory)
  }

  func place(_ bytes: [UInt8]) -> GuestAddress {
    let address = front.allocate(bytes.count, alignment: 1)
    check(front.memory.copyIn(bytes, at: address))
    return address
  }

  /// The guest says something and waits until it is taken.
  func say(_ bytes: [UInt8], within limit: Duration = .seconds(10)) throws {
    transmit.offer([DriverBuffer(place(bytes), UInt32(bytes.count), isDeviceWritable: false)])
    _ = try transmit.nextUsed(within: limit)
  }
  func say(_ text: String) throws { try say(Array(text.utf8)) }

  /// The guest waits for input in a buffer of this size.
  func listen(_ size: Int = 100) throws -> [UInt8] {
    let address = front.allocate(size, alignment: 1)
    receive.offer([DriverBuffer(address, UInt32(size), isDeviceWritable: true)])
    let used = try receive.nextUsed()
    return try unwrap(front.memory.bytes(at: address, count: Int(used.written ?? 0)))
  }

  /// Kilobytes of private memory.
  var privateKilobytes: Int {
    let status = (try? String(contentsOfFile: "/proc/\(process.processIdentifier)/status", encoding: .utf8)) ?? ""
    let line = status.split(separator: "\n").first { $0.hasPrefix("RssAnon") } ?? ""
    return Int(line.filter(\.isNumber)) ?? -1
  }

  func exitCode(within limit: Duration = .seconds(5)) -> Int32? {
    let end = MonotonicTime.now.advanced(by: limit)
    while process.isRunning {
      guard MonotonicTime.now < end else { return nil }
      usleep(2000)
    }
    return process.terminationReason == .exit ? process.terminationStatus : nil
  }
}

@Suite(.serialized) struct ConsoleProgramTests {
  private func terminalRig(_ terminal: borrowing PersonTerminal) throws -> ConsoleRig {
    let fd = try terminal.terminal.duplicate().release()
    let handle = FileHandle(fileDescriptor: fd, closeOnDealloc: true)
    return try ConsoleRig(["--tty"], input: handle, output: handle)
  }

  @Test func aPersonAndAGuestTalkThroughATerminalWhichIsPutBackAtTheEnd() throws {
    let terminal = try PersonTerminal()
    let before = terminal.mode()
    let rig = try terminalRig(terminal)
    checkEqual(terminal.mode().c_lflag & tcflag_t(ICANON | ECHO), 0)
    try rig.say("login: ")
    checkEqual(text(available(terminal.person)), "login: ")
    try terminal.person.writeAll(Array("root\r".utf8))
    var heard = try rig.listen()
    while heard.count < 5 { heard += try rig.listen() }
    checkEqual(text(heard), "root\r")
    kill(rig.process.processIdentifier, SIGTERM)
    checkEqual(rig.exitCode(), 0)
    checkEqual(terminal.mode().c_lflag, before.c_lflag)
    checkEqual(terminal.mode().c_iflag, before.c_iflag)
  }

  @Test func theEscapeKeyEndsAConsoleThatNobodySupervises() throws {
    let terminal = try PersonTerminal()
    let before = terminal.mode()
    let rig = try terminalRig(terminal)
    try terminal.person.writeAll([0x01, 0x78])
    checkEqual(rig.exitCode(), 0)
    checkEqual(terminal.mode().c_lflag, before.c_lflag)
  }

  @Test func theGuestSeesTheWindowAndItsChanges() throws {
    let terminal = try PersonTerminal()
    var size = winsize(ws_row: 31, ws_col: 117, ws_xpixel: 0, ws_ypixel: 0)
    check(ioctl(terminal.person.rawValue, UInt(TIOCSWINSZ), &size) == 0)
    let rig = try terminalRig(terminal)
    check(rig.front.features.contains(.consoleSize))
    var space = ConsoleConfiguration(decoding: try rig.front.configuration(12))
    checkEqual(space.columns, 117)
    checkEqual(space.rows, 31)
    size.ws_col = 80
    size.ws_row = 24
    check(ioctl(terminal.person.rawValue, UInt(TIOCSWINSZ), &size) == 0)
    kill(rig.process.processIdentifier, SIGWINCH)
    for _ in 0..<100 where space.columns != 80 {
      usleep(5000)
      space = ConsoleConfiguration(decoding: try rig.front.configuration(12))
    }
    checkEqual(space.columns, 80)
    checkEqual(space.rows, 24)
  }

  @Test func inputWaitsForTheGuestsBuffersAndIsNotLost() throws {
    let pipe = Pipe()
    let rig = try ConsoleRig(["--tty"], input: pipe.fileHandleForReading)
    let sent = (0..<30_000).map { UInt8(truncatingIfNeeded: $0 &* 5) }
    try pipe.fileHandleForWriting.write(contentsOf: Data(sent))
    var heard: [UInt8] = []
    var size = 0
    while heard.count < sent.count {
      size = (size + 37) % 900
      heard += try rig.listen(1 + size)
    }
    check(heard == sent, "\(heard.count) bytes")
  }

  @Test(arguments: [false, true]) func chainsOfEveryShapeAreSaidInOrder(packed: Bool) throws {
    let path = temporaryPath("log")
    defer { unlink(path) }
    let rig = try ConsoleRig(["--file=\(path)"], wanting: { packed ? $0 : $0.subtracting(.packedRing) })
    var expected: [UInt8] = []
    for round in 1...40 {
      var buffers: [DriverBuffer] = []
      for piece in 0..<(1 + round % 7) {
        let bytes = (0..<(1 + round * piece * 3)).map { UInt8(truncatingIfNeeded: $0 &+ round) }
        buffers.append(DriverBuffer(rig.place(bytes), UInt32(bytes.count), isDeviceWritable: false))
        expected += bytes
      }
      rig.transmit.offer(buffers)
      checkEqual(try rig.transmit.nextUsed().written ?? 0, 0)
    }
    check(try Data(contentsOf: URL(fileURLWithPath: path)) == Data(expected))
  }

  @Test func aFloodThatNobodyReadsCostsNoMemoryAndHoldsNobodyUp() throws {
    let path = temporaryPath("socket")
    let rig = try ConsoleRig(["--listen=\(path)"])
    let chunk = rig.place([UInt8](repeating: 0x2E, count: 1 << 20))
    func flood(_ count: Int) throws {
      for _ in 0..<count {
        rig.transmit.offer([DriverBuffer(chunk, 1 << 20, isDeviceWritable: false)])
        _ = try rig.transmit.nextUsed()
      }
    }
    try flood(16)
    let before = rig.privateKilobytes
    let start = MonotonicTime.now
    try flood(2048)
    let time = MonotonicTime.now.since(start)
    let after = rig.privateKilobytes
    check(before > 0 && after - before < 256, "\(before) KiB before, \(after) KiB after 2 GiB")
    print("2 GiB of console output without a reader: \(time), private memory \(before) KiB before, \(after) KiB after")
    // And who comes then sees the newest of it.
    try rig.say("the end")
    let client = try UnixSocket.connect(to: path)
    usleep(50_000)
    let seen = available(client)
    checkEqual(seen.count, ConsolePort.outputByteCount)
    check(text(seen).hasSuffix("the end"))
    kill(rig.process.processIdentifier, SIGTERM)
    checkEqual(rig.exitCode(), 0)
    check(access(path, F_OK) != 0, "The socket's file is gone")
  }

  @Test func aSlowClientHoldsTheGuestUpAndGetsEverything() throws {
    let path = temporaryPath("socket")
    let rig = try ConsoleRig(["--listen=\(path)"])
    let client = try UnixSocket.connect(to: path)
    try rig.say("x")
    checkEqual(text(available(client)), "x")
    let sent = (0..<3_000_000).map { UInt8(truncatingIfNeeded: $0 &* 17 >> 3) }
    rig.transmit.offer([DriverBuffer(rig.place(sent), UInt32(sent.count), isDeviceWritable: false)])
    usleep(100_000)
    checkEqual(rig.transmit.driver.nextUsed(), .empty)  // Held up.
    // Input and the front end are served meanwhile.
    try client.writeAll(Array("still here".utf8))
    checkEqual(text(try rig.listen()), "still here")
    check(try rig.front.configuration(12).count == 12)
    var seen: [UInt8] = []
    while seen.count < sent.count {
      let piece = available(client, limit: 50_000)
      if piece.isEmpty { break }
      seen += piece
    }
    check(seen == sent, "\(seen.count) bytes")
    _ = try rig.transmit.nextUsed()
  }

  @Test func aQueueIsStoppedInTheMiddleOfALongOutput() throws {
    let path = temporaryPath("socket")
    let rig = try ConsoleRig(["--listen=\(path)"])
    let client = try UnixSocket.connect(to: path)
    try rig.say("x")
    let sent = [UInt8](repeating: 0x41, count: 3_000_000)
    rig.transmit.offer([DriverBuffer(rig.place(sent), UInt32(sent.count), isDeviceWritable: false)])
    usleep(50_000)
    let base = try rig.front.stop(rig.transmit)
    checkEqual(base, 2)  // Both chains are done as far as the ring is concerned.
    _ = try rig.transmit.nextUsed()
    try rig.front.start(rig.transmit, base: base)
    _ = available(client)
    try rig.say("after")
    usleep(20_000)
    check(text(available(client)).hasSuffix("after"))
  }

  @Test func aPseudoTerminalIsMadeAndItsPathPrinted() throws {
    let output = Pipe()
    let rig = try ConsoleRig(["--pty"], output: output.fileHandleForWriting)
    let line = text(Array(output.fileHandleForReading.availableData))
    check(line.hasPrefix("Console: /dev/pts/"), line)
    let person = try OwnedFD.open(String(line.dropFirst(9).dropLast()), O_RDWR | O_NOCTTY)
    try rig.say("hello\r\n")
    checkEqual(text(available(person)), "hello\r\n")
    try person.writeAll(Array("hi\r".utf8))
    var heard = try rig.listen()
    while heard.count < 3 { heard += try rig.listen() }
    checkEqual(text(heard), "hi\r")
  }

  @Test func theEmergencyRegisterWritesBeforeAnyQueueDoes() throws {
    let path = temporaryPath("log")
    defer { unlink(path) }
    let rig = try ConsoleRig(["--file=\(path)"])
    for byte in Array("oops".utf8) { try rig.front.writeConfiguration([byte, 0, 0, 0], at: 8) }
    checkEqual(try String(contentsOfFile: path, encoding: .utf8), "oops")
    #expect(throws: (any Error).self) { try rig.front.writeConfiguration([1, 0], at: 0) }
  }

  @Test func aBrokenRingIsReportedAndInputGoesOn() throws {
    let pipe = Pipe()
    let rig = try ConsoleRig(["--tty"], input: pipe.fileHandleForReading)
    rig.transmit.driver.setAvailableIndex(9999)
    rig.transmit.kick.signal()
    check(try rig.transmit.error.fd.waitUntil(.readable, timeout: .seconds(5)))
    try pipe.fileHandleForWriting.write(contentsOf: Data("a".utf8))
    checkEqual(text(try rig.listen()), "a")
  }

  @Test func startingWithoutASinkOrWithTwoIsRefusedInOneLine() throws {
    for arguments in [[], ["--null", "--pty"], ["--tty-in-fd=0"], ["--file=/nonexistent/x"]] {
      let process = Process()
      process.executableURL = DeviceProcess.programs.appendingPathComponent("martlet-console")
      process.arguments = ["--socket-path=\(temporaryPath("s"))"] + arguments
      let errors = Pipe()
      process.standardError = errors
      try process.run()
      process.waitUntilExit()
      checkEqual(process.terminationStatus, 1)
      let line = text(Array(errors.fileHandleForReading.readDataToEndOfFile()))
      check(line.hasPrefix("martlet-console: error: ") && line.filter { $0 == "\n" }.count == 1, line)
    }
  }
}
