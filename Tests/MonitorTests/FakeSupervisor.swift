import ControlProtocol
import Foundation
import Glibc
import HostSystem
import Monitor
import Synchronization
import Testing

/// A core on a thread of its own and the supervisor's end of its channel.
final class FakeSupervisor: @unchecked Sendable {
  // @unchecked: the socket is used by the test's thread only, the exit code is atomic.
  private let socket: OwnedFD
  private let exit = Atomic<Int32>(-1)
  private var thread: HostThread?
  private var sequence: UInt32 = 0
  private(set) var messages: [(message: CoreMessage, sequence: UInt32)] = []
  /// The test's end of the serial stream.
  private var serial: OwnedFD?
  private(set) var serialOutput = ""

  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()

  /// A built micro guest, or nil with a sentence when it or KVM is missing.
  static func guest(_ name: String) throws -> String? {
    guard access("/dev/kvm", R_OK | W_OK) == 0 else {
      print("skipped: /dev/kvm is missing or not accessible")
      return nil
    }
    let process = Process()
    process.executableURL = root.appendingPathComponent("scripts/micro-guests")
    let folder = root.appendingPathComponent(".build/micro-monitor")
    process.arguments = [folder.path]
    process.standardOutput = FileHandle.nullDevice
    if !built.exchange(true, ordering: .relaxed) {
      try process.run()
      process.waitUntilExit()
      #expect(process.terminationStatus == 0)
    }
    return folder.appendingPathComponent(name).path
  }

  private static let built = Atomic<Bool>(false)

  init() throws {
    let pair = try UnixSocket.pair(.sequencedPacket)
    socket = try pair.first.duplicate()
    let number = try pair.second.duplicate().release()
    thread = try HostThread.start(name: "core") { [self] in
      exit.store((try? CoreProgram.serve(OwnedFD(owning: number))) ?? -2, ordering: .releasing)
    }
  }

  @discardableResult
  func send(_ message: SupervisorMessage, _ descriptors: [Int32] = []) -> UInt32 {
    sequence += 1
    let outcome = UnixSocket.send(socket, message.encode(sequence: sequence), descriptors: descriptors)
    if case .bytes = outcome { return sequence }
    Issue.record("the core does not take messages: \(outcome)")
    return sequence
  }

  func configure(
    kernel: String, initramfs: String? = nil, cpus: UInt16 = 1, memory: UInt64 = 128 << 20, commandLine: String,
    restarts: Bool = true, hasSerial: Bool = true
  ) throws -> UInt32 {
    let kvm = try OwnedFD.open("/dev/kvm", O_RDWR)
    let file = try OwnedFD.open(kernel, O_RDONLY)
    let configuration = CoreConfiguration(
      name: "test", cpuCount: cpus, memorySize: memory, commandLine: commandLine, hasInitramfs: initramfs != nil,
      hasSerial: hasSerial, restartsOnReset: restarts, replyDeadline: 1000)
    guard let initramfs else { return send(.configure(configuration), [kvm.rawValue, file.rawValue]) }
    let second = try OwnedFD.open(initramfs, O_RDONLY)
    return send(.configure(configuration), [kvm.rawValue, file.rawValue, second.rawValue])
  }

  func connectSerial() throws {
    let pair = try UnixSocket.pair(.stream)
    serial = try pair.first.duplicate()
    send(.stream(.serial), [pair.second.rawValue])
  }

  func type(_ text: String) throws {
    switch serial {
    case .some(let serial): try serial.writeAll(Array(text.utf8))
    case .none: break
    }
  }

  /// Waits until a message satisfies `condition`; collects serial output meanwhile.
  func wait(
    _ seconds: Int = 10, for condition: (CoreMessage, UInt32) -> Bool
  ) throws -> (message: CoreMessage, sequence: UInt32)? {
    let deadline = MonotonicTime.now.advanced(by: .seconds(seconds))
    var buffer = [UInt8](repeating: 0, count: Wire.maximumLength)
    while MonotonicTime.now < deadline {
      readSerial()
      // Often: a serial stream nobody reads fills up, for the core sends bytes one by one.
      guard try socket.waitUntil(.readable, timeout: .milliseconds(2)) else { continue }
      var count = 0
      buffer.withUnsafeMutableBytes { bytes in
        let reception = UnixSocket.receive(socket, into: bytes)
        if case .bytes(let got) = reception.transfer { count = got }
      }
      guard count > 0 else { return nil }
      let decoded = try CoreMessage.decode(Array(buffer[..<count]))
      messages.append(decoded)
      if condition(decoded.message, decoded.sequence) {
        readSerial()
        return decoded
      }
    }
    return nil
  }

  /// The answer to a request.
  func answer(_ sequence: UInt32, _ seconds: Int = 10) throws -> CoreMessage? {
    try wait(seconds) { _, number in number == sequence }?.message
  }

  func readSerial() {
    switch serial {
    case .none: break
    case .some(let serial):
      var buffer = [UInt8](repeating: 0, count: 4096)
      // Bounded by what the core has sent: nothing left, or the end.
      while true {
        var count = 0
        buffer.withUnsafeMutableBytes { bytes in
          if case .bytes(let got) = UnixSocket.receive(serial, into: bytes).transfer { count = got }
        }
        if count == 0 { return }
        serialOutput += String(decoding: buffer[..<count], as: UTF8.self)
      }
    }
  }

  /// Waits for text on the serial port.
  func waitForSerial(times: Int = 1, _ text: String, _ seconds: Int = 5) -> Bool {
    let deadline = MonotonicTime.now.advanced(by: .seconds(seconds))
    while MonotonicTime.now < deadline {
      readSerial()
      if serialOutput.components(separatedBy: text).count > times { return true }
      usleep(5000)
    }
    return false
  }

  /// The core's exit code.
  func exitCode() -> Int32 {
    thread?.join()
    thread = nil
    return exit.load(ordering: .acquiring)
  }

  /// Closes the channel, which orders the core to exit.
  func hangUp() { _ = shutdown(socket.rawValue, Int32(SHUT_RDWR)) }
}
