import ConsoleDevice
import Foundation
import HostSystem
import TestSupport
import Testing

@Suite struct TerminalPortTests {
  private func port(on terminal: borrowing PersonTerminal) throws -> PortHarness {
    try PortHarness(.terminal(input: terminal.terminal.duplicate(), output: terminal.terminal.duplicate()))
  }

  @Test func bytesPassBothWaysUnchanged() throws {
    let terminal = try PersonTerminal()
    var harness = try port(on: terminal)
    let output: [UInt8] = [0x1B, 0x5B, 0x41, 0x0A, 0x0D, 0x0A, 0xFF, 0x00]
    checkEqual(harness.write(output), output.count)
    checkEqual(available(terminal.person), output)
    try terminal.person.writeAll([0x03, 0x0D, 0x11, 0x13, 0x1C, 0x7F])
    try harness.turn { $0.inputCount == 6 }
    checkEqual(Array(harness.input().utf8), [0x03, 0x0D, 0x11, 0x13, 0x1C, 0x7F])
    checkEqual(available(terminal.person), [])  // No echo.
  }

  @Test func theTerminalsModeIsPutBackAtTheEnd() throws {
    let terminal = try PersonTerminal()
    let before = terminal.mode()
    check(before.c_lflag & tcflag_t(ICANON) != 0)
    var harness: PortHarness? = try port(on: terminal)
    check(harness?.port.isTerminal == true)
    checkEqual(terminal.mode().c_lflag & tcflag_t(ICANON | ECHO | ISIG), 0)
    harness = nil
    let after = terminal.mode()
    checkEqual(after.c_lflag, before.c_lflag)
    checkEqual(after.c_iflag, before.c_iflag)
    checkEqual(after.c_oflag, before.c_oflag)
    // The blocking mode of the shell's own description was never touched.
    checkEqual(fcntl(terminal.terminal.rawValue, F_GETFL) & O_NONBLOCK, 0)
  }

  @Test func theEscapeKeyIsSeenAndWhatWasTypedBeforeItIsKept() throws {
    let terminal = try PersonTerminal()
    var harness = try port(on: terminal)
    try terminal.person.writeAll(Array("ls".utf8) + [0x01, 0x01, 0x01, 0x78])
    var outcome: ConsolePort.Outcome = []
    for _ in 0..<20 where !outcome.contains(.quit) { outcome.formUnion(try harness.turn()) }
    check(outcome.contains(.quit))
    checkEqual(harness.input(), "ls\u{1}")
  }

  @Test func theWindowSizeIsTheTerminals() throws {
    let terminal = try PersonTerminal()
    var size = winsize(ws_row: 31, ws_col: 117, ws_xpixel: 0, ws_ypixel: 0)
    check(ioctl(terminal.person.rawValue, UInt(TIOCSWINSZ), &size) == 0)
    let harness = try port(on: terminal)
    checkEqual(harness.port.windowSize, WindowSize(columns: 117, rows: 31))
  }

  @Test func aReaderThatDoesNotReadHoldsTheGuestUpForAMomentOnly() throws {
    let terminal = try PersonTerminal()
    var harness = try port(on: terminal)
    let line = [UInt8](repeating: 0x2E, count: 1024)
    var written = 0
    for _ in 0..<4096 {
      let taken = harness.write(line)
      written += taken
      if taken < line.count { break }
    }
    check(written < 4096 * 1024, "The guest is held up")
    checkEqual(harness.port.droppedByteCount, 0)
    let start = MonotonicTime.now
    var outcome: ConsolePort.Outcome = []
    while !outcome.contains(.room), MonotonicTime.now.since(start) < .seconds(3) { outcome = try harness.turn(.seconds(1)) }
    let waited = MonotonicTime.now.since(start)
    check(waited > .milliseconds(300) && waited < .seconds(2), "Patience lasted \(waited)")
    // From now on nobody is held up, whatever the amount.
    for _ in 0..<4096 { checkEqual(harness.write(line), line.count) }
    check(harness.port.droppedByteCount > 1 << 20)
    check(harness.port.unsentByteCount <= ConsolePort.outputByteCount)
    // The reader comes back: it sees the newest output, and is a reader again.
    _ = harness.write("the end")
    var seen: [UInt8] = []
    for _ in 0..<200 where harness.port.unsentByteCount > 0 {
      seen += available(terminal.person)
      try harness.turn(.milliseconds(20))
    }
    seen += available(terminal.person)
    check(text(seen).hasSuffix("the end"))
    let dropped = harness.port.droppedByteCount
    checkEqual(harness.write("x"), 1)
    checkEqual(harness.port.droppedByteCount, dropped)
  }

  @Test func nothingIsLostToAReaderThatIsMerelySlow() throws {
    let terminal = try PersonTerminal()
    var harness = try port(on: terminal)
    var sent: [UInt8] = []
    var seen: [UInt8] = []
    var next: UInt8 = 0
    var pending: [UInt8] = []
    while sent.count < 400_000 {
      if pending.isEmpty {
        pending = (0..<5000).map { _ in
          next = next &+ 1
          return next
        }
        sent += pending
      }
      pending.removeFirst(harness.write(pending))
      try harness.turn(.milliseconds(1))
      seen += available(terminal.person, limit: 3000)
    }
    while !pending.isEmpty || harness.port.unsentByteCount > 0 {
      pending.removeFirst(harness.write(pending))
      try harness.turn(.milliseconds(1))
      seen += available(terminal.person)
    }
    seen += available(terminal.person)
    check(seen == sent, "\(seen.count) of \(sent.count) bytes, or in another order")
    checkEqual(harness.port.droppedByteCount, 0)
  }

  @Test func inputNobodyTakesStaysWithTheKernelAndIsNotLost() throws {
    let pair = try UnixSocket.pair(.stream)
    try pair.split { (person, ours) throws -> Void in
      var harness = try PortHarness(.terminal(input: ours.duplicate(), output: ours.duplicate()))
      check(!harness.port.isTerminal)
      let sent = (0..<50_000).map { UInt8(truncatingIfNeeded: $0 &* 7) }
      try person.writeAll(sent)
      for _ in 0..<20 { try harness.turn(.milliseconds(5)) }
      check(harness.port.inputCount <= ConsolePort.inputByteCount)
      var seen: [UInt8] = []
      for _ in 0..<500 where seen.count < sent.count {
        var bytes = [UInt8](repeating: 0, count: 777)
        let count = bytes.withUnsafeMutableBytes { harness.port.takeInput(into: $0) }
        seen += bytes[..<count]
        try harness.turn(.milliseconds(5))
      }
      check(seen == sent, "\(seen.count) of \(sent.count) bytes")
    }
  }

  @Test func aFileAsInputIsReadToItsEnd() throws {
    let path = temporaryPath("input")
    defer { unlink(path) }
    let sent = (0..<20_000).map { UInt8(truncatingIfNeeded: $0) }
    try Data(sent).write(to: URL(fileURLWithPath: path))
    var harness = try PortHarness(
      .terminal(input: OwnedFD.open(path, O_RDONLY), output: OwnedFD.open("/dev/null", O_WRONLY)))
    var seen: [UInt8] = []
    for _ in 0..<100 where seen.count < sent.count {
      try harness.turn(.milliseconds(1))
      var bytes = [UInt8](repeating: 0, count: 1000)
      let count = bytes.withUnsafeMutableBytes { harness.port.takeInput(into: $0) }
      seen += bytes[..<count]
    }
    check(seen == sent)
  }
}

@Suite struct OtherSinkTests {
  @Test func aPseudoTerminalShowsWhatWasSaidBeforeAnybodyCame() throws {
    let made = try PseudoTerminal.make()
    let path = made.path
    var harness = try PortHarness(.pseudoTerminal(made.master.duplicate()))
    checkEqual(harness.write("early\r\n"), 7)
    let person = try OwnedFD.open(path, O_RDWR | O_NOCTTY)
    checkEqual(text(available(person)), "early\r\n")
    try person.writeAll(Array("hello\r".utf8))
    try harness.turn { $0.inputCount == 6 }
    checkEqual(harness.input(), "hello\r")
    checkEqual(available(person), [])
  }

  @Test func aPseudoTerminalCanBeLeftAndComeBackTo() throws {
    let made = try PseudoTerminal.make()
    let path = made.path
    var harness = try PortHarness(.pseudoTerminal(made.master.duplicate()))
    for round in 0..<3 {
      let person = try OwnedFD.open(path, O_RDWR | O_NOCTTY)
      checkEqual(harness.write("round \(round)"), 7)
      checkEqual(text(available(person)), "round \(round)")
    }
    // Nobody is there now: no hang-up keeps the loop turning.
    harness.port.watch(with: &harness.watcher)
    checkEqual(try harness.watcher.loop.wait(timeout: .milliseconds(100)).count, 0)
  }

  @Test func aFileIsAppendedTo() throws {
    let path = temporaryPath("log")
    defer { unlink(path) }
    try Data("before\n".utf8).write(to: URL(fileURLWithPath: path))
    var harness = try PortHarness(.appending(OwnedFD.open(path, O_WRONLY | O_APPEND)))
    checkEqual(harness.write("after\n"), 6)
    checkEqual(try String(contentsOfFile: path, encoding: .utf8), "before\nafter\n")
  }

  @Test func aFullDiskLosesOutputAndHoldsNobodyUp() throws {
    var harness = try PortHarness(.appending(OwnedFD.open("/dev/full", O_WRONLY)))
    for _ in 0..<1000 { checkEqual(harness.write("a line of output\n"), 17) }
    checkEqual(harness.port.droppedByteCount, 17_000)
  }

  @Test func nothingTakesEverythingAtOnce() throws {
    var harness = try PortHarness(.null())
    let chunk = [UInt8](repeating: 1, count: 1 << 20)
    for _ in 0..<100 { checkEqual(harness.write(chunk), chunk.count) }
    checkEqual(harness.port.unsentByteCount, 0)
  }

  @Test func aSocketKeepsTheNewestOutputForItsFirstClient() throws {
    let path = temporaryPath("socket")
    defer { unlink(path) }
    var harness = try PortHarness(.socket(UnixSocket.listen(at: path)))
    let line = [UInt8](repeating: 0x2E, count: 1000)
    for _ in 0..<200 { checkEqual(harness.write(line), 1000) }
    _ = harness.write("login: ")
    check(harness.port.droppedByteCount >= 200_000 - 65_536)
    let client = try UnixSocket.connect(to: path)
    try harness.turn { $0.hasClient && $0.unsentByteCount == 0 }
    let seen = available(client)
    checkEqual(seen.count, ConsolePort.outputByteCount)
    check(text(seen).hasSuffix("...login: "))
  }

  @Test func socketClientsAreServedOneAfterTheOther() throws {
    let path = temporaryPath("socket")
    defer { unlink(path) }
    var harness = try PortHarness(.socket(UnixSocket.listen(at: path)))
    for round in 0..<3 {
      let client = try UnixSocket.connect(to: path)
      try harness.turn { $0.hasClient }
      // A second one waits and hears nothing.
      let second = try UnixSocket.connect(to: path)
      checkEqual(harness.write("out \(round)"), 5)
      try client.writeAll(Array("in \(round)".utf8))
      try harness.turn { $0.inputCount == 4 }
      checkEqual(harness.input(), "in \(round)")
      checkEqual(text(available(client)), "out \(round)")
      checkEqual(available(second), [])
      shutdown(client.rawValue, CInt(SHUT_RDWR))
      _ = consume client
      try harness.turn { !$0.hasClient }
      try harness.turn { $0.hasClient }
      checkEqual(harness.write("for the second"), 14)
      checkEqual(text(available(second)), "for the second")
      _ = consume second
      try harness.turn { !$0.hasClient }
    }
  }

  @Test func aClientThatOnlyStoppedWritingStillReads() throws {
    let path = temporaryPath("socket")
    defer { unlink(path) }
    var harness = try PortHarness(.socket(UnixSocket.listen(at: path)))
    let client = try UnixSocket.connect(to: path)
    try client.writeAll(Array("command\n".utf8))
    shutdown(client.rawValue, CInt(SHUT_WR))
    try harness.turn { $0.inputCount == 8 }
    for _ in 0..<5 { try harness.turn(.milliseconds(10)) }
    checkEqual(harness.write("answer\n"), 7)
    checkEqual(text(available(client)), "answer\n")
    // And it does not keep the loop turning.
    harness.port.watch(with: &harness.watcher)
    checkEqual(try harness.watcher.loop.wait(timeout: .milliseconds(100)).count, 0)
  }

  @Test func aClientThatLeavesWithItsInputUnreadLosesNone() throws {
    let path = temporaryPath("socket")
    defer { unlink(path) }
    var harness = try PortHarness(.socket(UnixSocket.listen(at: path)))
    let sent = (0..<20_000).map { UInt8(truncatingIfNeeded: $0 &* 3) }
    do {
      let client = try UnixSocket.connect(to: path)
      try client.writeAll(sent)
    }
    var seen: [UInt8] = []
    for _ in 0..<200 where seen.count < sent.count {
      try harness.turn(.milliseconds(5))
      var bytes = [UInt8](repeating: 0, count: 500)
      let count = bytes.withUnsafeMutableBytes { harness.port.takeInput(into: $0) }
      seen += bytes[..<count]
    }
    check(seen == sent, "\(seen.count) bytes")
    try harness.turn { !$0.hasClient }
  }
}
