import ConsoleDevice
import Foundation
import HostSystem
import TestSupport
import Testing

/// A port with a loop, as a program has it, driven by a test.
struct PortHarness: ~Copyable {
  let port: ConsolePort
  var watcher: LoopWatcher

  init(_ sink: ConsoleSink) throws {
    let watcher = try LoopWatcher()
    port = try ConsolePort(sink)
    self.watcher = watcher
  }

  /// Handles what happens within `timeout`; returns what it came to.
  @discardableResult
  mutating func turn(_ timeout: Duration = .milliseconds(50)) throws -> ConsolePort.Outcome {
    port.watch(with: &watcher)
    var outcome = port.readUnwatchableInput()
    for event in try watcher.loop.wait(timeout: timeout) {
      outcome.formUnion(port.ready(event.token, event.readiness))
    }
    port.watch(with: &watcher)
    return outcome
  }

  /// Turns until `done` or for two seconds.
  mutating func turn(until done: (ConsolePort) -> Bool) throws {
    let deadline = MonotonicTime.now.advanced(by: .seconds(2))
    while !done(port), MonotonicTime.now < deadline { try turn(.milliseconds(20)) }
    check(done(port), "It did not happen within two seconds")
  }

  mutating func write(_ text: String) -> Int { Array(text.utf8).withUnsafeBytes { port.write($0) } }
  mutating func write(_ bytes: [UInt8]) -> Int { bytes.withUnsafeBytes { port.write($0) } }

  mutating func input() -> String {
    var bytes = [UInt8](repeating: 0, count: port.inputCount)
    let count = bytes.withUnsafeMutableBytes { port.takeInput(into: $0) }
    return String(decoding: bytes[..<count], as: UTF8.self)
  }
}

/// What can be read now, up to `limit` bytes.
func available(_ fd: borrowing OwnedFD, limit: Int = 1 << 20) -> [UInt8] {
  var all: [UInt8] = []
  var piece = [UInt8](repeating: 0, count: 65536)
  while all.count < limit, (try? fd.waitUntil(.readable, timeout: .milliseconds(30))) == true {
    guard
      case .bytes(let count) = piece.withUnsafeMutableBytes({
        fd.read(into: UnsafeMutableRawBufferPointer(rebasing: $0[..<min(65536, limit - all.count)]))
      })
    else { break }
    all += piece[..<count]
  }
  return all
}

func text(_ bytes: [UInt8]) -> String { String(decoding: bytes, as: UTF8.self) }

/// A path of this test's own.
func temporaryPath(_ name: String) -> String { "/tmp/martlet-test-\(getpid())-\(UInt32.random(in: 0 ... .max))-\(name)" }

/// A pseudo-terminal as a person's terminal: the person sits at the master side.
struct PersonTerminal: ~Copyable {
  let person: OwnedFD
  let terminal: OwnedFD

  init() throws {
    let made = try PseudoTerminal.make()
    let terminal = try OwnedFD.open(made.path, O_RDWR | O_NOCTTY)
    person = try made.master.duplicate()
    self.terminal = terminal
  }

  func mode() -> termios {
    var mode = termios()
    check(tcgetattr(terminal.rawValue, &mode) == 0)
    return mode
  }
}
