import ConsoleDevice
import Foundation
import HostSystem
import TestSupport
import Testing

/// The carrier runs in a thread of its own; the test plays the core at one end and a person at the other.
@Suite struct SerialCarrierTests {
  private final class Result: @unchecked Sendable { var end: SerialCarrier.End? }

  /// Runs a carrier between a stream and a socket sink, `body` with the core's end and a connected client.
  private func carry(
    control: consuming ControlLine? = nil, sink: ConsoleSink, _ body: (consuming OwnedFD) throws -> Void
  ) throws -> SerialCarrier.End? {
    let pair = try UnixSocket.pair(.stream)
    let signals = try EventFD()
    let result = Result()
    let carriersEnd = try pair.second.duplicate()
    nonisolated(unsafe) let carrier = try SerialCarrier.make(
      stream: carriersEnd, port: ConsolePort(sink), signals: signals.fd.duplicate(), control: control)
    let thread = try HostThread.start(name: "carrier") { result.end = try? carrier.run() }
    let core = try pair.first.duplicate()
    _ = consume pair
    do { try body(core) } catch {
      signals.signal()
      thread.join()
      throw error
    }
    thread.join()
    return result.end
  }

  @Test func bytesPassBothWaysAndTheEndOfTheStreamIsTheEnd() throws {
    let path = temporaryPath("serial")
    defer { unlink(path) }
    let sink = try ConsoleSink.socket(UnixSocket.listen(at: path))
    let client = try UnixSocket.connect(to: path)
    let end = try carry(sink: sink) { core in
      try core.writeAll(Array("boot\n".utf8))
      checkEqual(text(available(client)), "boot\n")
      try client.writeAll(Array("root\n".utf8))
      checkEqual(text(available(core)), "root\n")
    }
    checkEqual(end, .streamEnded)
  }

  @Test func aFloodArrivesWholeAndInOrder() throws {
    let path = temporaryPath("serial")
    defer { unlink(path) }
    let sink = try ConsoleSink.socket(UnixSocket.listen(at: path))
    let client = try UnixSocket.connect(to: path)
    let sent = (0..<3_000_000).map { UInt8(truncatingIfNeeded: $0 &* 31 >> 3) }
    final class Seen: @unchecked Sendable { var bytes: [UInt8] = [] }
    let seen = Seen()
    let number = client.rawValue
    let reader = try HostThread.start(name: "reader") {
      var piece = [UInt8](repeating: 0, count: 10_000)
      while seen.bytes.count < sent.count {
        let count = read(number, &piece, piece.count)
        if count <= 0 { break }
        seen.bytes += piece[..<count]
      }
    }
    let end = try carry(sink: sink) { core in try core.writeAll(sent) }
    shutdown(number, CInt(SHUT_RDWR))
    reader.join()
    checkEqual(end, .streamEnded)
    check(seen.bytes == sent, "\(seen.bytes.count) of \(sent.count) bytes")
  }

  @Test func theEscapeKeyIsReportedToTheSupervisorWhoEndsTheVM() throws {
    let terminal = try PersonTerminal()
    let control = try UnixSocket.pair(.stream)
    let line = ControlLine(try control.second.duplicate())
    let sink = try ConsoleSink.terminal(input: terminal.terminal.duplicate(), output: terminal.terminal.duplicate())
    let end = try carry(control: line, sink: sink) { core in
      try terminal.person.writeAll([0x61, 0x01, 0x78])
      checkEqual(text(available(core)), "a")
      checkEqual(text(available(control.first)), "quit\n")
    }
    checkEqual(end, .streamEnded)
  }

  @Test func withoutASupervisorTheEscapeKeyEndsTheCarrier() throws {
    let terminal = try PersonTerminal()
    let sink = try ConsoleSink.terminal(input: terminal.terminal.duplicate(), output: terminal.terminal.duplicate())
    var kept: OwnedFD? = nil
    let end = try carry(sink: sink) { core in
      kept = consume core
      try terminal.person.writeAll([0x01, 0x78])
    }
    checkEqual(end, .quit)
    _ = consume kept
  }
}
