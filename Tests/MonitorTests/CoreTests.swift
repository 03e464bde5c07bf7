import ControlProtocol
import Foundation
import Glibc
import HostSystem
import Monitor
import Testing

@Suite("The core, spoken to as its supervisor does", .serialized)
struct CoreTests {
  @Test("A guest is configured, started, heard on the serial port, and its power-off reported")
  func wholeLife() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    let configured = try core.configure(kernel: kernel, cpus: 2, commandLine: "test=boot,smp")
    try core.connectSerial()
    #expect(try core.answer(configured) == .ready)
    #expect(try core.answer(core.send(.start(deviceCount: 0))) == .started)
    #expect(try core.wait { message, _ in message == .guest(.poweredOff) } != nil)
    #expect(core.exitCode() == 0)
    core.readSerial()
    #expect(core.serialOutput.contains("MICRO done ok"), "\(core.serialOutput)")
  }

  @Test("A reset restarts the guest in place and is reported; a later shut-down is answered")
  func resets() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    _ = try core.configure(kernel: kernel, commandLine: "test=reset by=acpi")
    try core.connectSerial()
    core.send(.start(deviceCount: 0))
    for _ in 0..<5 { #expect(try core.wait { message, _ in message == .guest(.reset) } != nil) }
    #expect(try core.answer(core.send(.shutdown)) == .done)
    #expect(try core.wait { message, _ in message == .guest(.shutDown) } != nil)
    #expect(core.exitCode() == 0)
    #expect(core.serialOutput.components(separatedBy: "MICRO start").count >= 5)
  }

  @Test("Where restarting is not wanted a reset ends the VM")
  func resetEnds() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    _ = try core.configure(kernel: kernel, commandLine: "test=reset by=cf9", restarts: false)
    core.send(.start(deviceCount: 0))
    #expect(try core.wait { message, _ in message == .guest(.resetEnded) } != nil)
    #expect(core.exitCode() == 0)
  }

  @Test("Pause stops the guest, resume lets it go on, information tells which")
  func pauses() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    _ = try core.configure(kernel: kernel, cpus: 2, commandLine: "test=idle ms=400")
    try core.connectSerial()
    #expect(try core.answer(core.send(.start(deviceCount: 0))) == .started)
    #expect(try core.answer(core.send(.pause)) == .done)
    guard case .information(let paused) = try core.answer(core.send(.information)) else {
      Issue.record("no information")
      return
    }
    #expect(paused.state == .paused)
    usleep(600_000)
    core.readSerial()
    #expect(!core.serialOutput.contains("MICRO done"))
    #expect(try core.answer(core.send(.resume)) == .done)
    #expect(try core.wait { message, _ in message == .guest(.poweredOff) } != nil)
    #expect(core.exitCode() == 0)
  }

  @Test("A reboot from outside restarts a hanging guest, also while paused")
  func reboots() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    _ = try core.configure(kernel: kernel, cpus: 4, commandLine: "test=boot,smp end=hang")
    try core.connectSerial()
    #expect(try core.answer(core.send(.start(deviceCount: 0))) == .started)
    for round in 1...10 {
      try #require(core.waitForSerial(times: round, "MICRO done ok"), "round \(round): \(core.serialOutput)")
      if round % 2 == 0 { #expect(try core.answer(core.send(.pause)) == .done) }
      #expect(try core.answer(core.send(.reboot)) == .done)
    }
    core.hangUp()
    #expect(core.exitCode() == 0)
    #expect(!core.serialOutput.contains("FAIL"), "\(core.serialOutput)")
  }

  @Test("Mistakes of the user become one sentence and the right kind", arguments: ["/bin/true", "/etc/passwd", "/"])
  func badKernels(path: String) throws {
    guard try FakeSupervisor.guest("micro.elf") != nil else { return }
    let core = try FakeSupervisor()
    let sequence = try core.configure(kernel: path, commandLine: "")
    guard case .failed(.input, let sentence) = try core.answer(sequence) else {
      Issue.record("not refused as input: \(core.messages)")
      return
    }
    #expect(sentence.hasPrefix("Kernel") && sentence.hasSuffix("."), "\(sentence)")
    #expect(core.exitCode() == 1)
  }

  @Test("An initramfs larger than memory is refused with the numbers")
  func largeInitramfs() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let path = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-\(UUID().uuidString)").path
    defer { unlink(path) }
    _ = FileManager.default.createFile(atPath: path, contents: nil)
    truncate(path, 1 << 30)
    let core = try FakeSupervisor()
    guard
      case .failed(.input, let sentence) = try core.answer(
        core.configure(kernel: kernel, initramfs: path, commandLine: ""))
    else {
      Issue.record("not refused as input: \(core.messages)")
      return
    }
    #expect(sentence.contains("1073741824"), "\(sentence)")
  }

  @Test("A broken message or the end of the channel ends the core")
  func channelEnds() throws {
    let first = try FakeSupervisor()
    first.hangUp()
    #expect(first.exitCode() == 0)
    let second = try FakeSupervisor()
    second.send(
      .configure(
        CoreConfiguration(
          name: "x", cpuCount: 1, memorySize: 4096, commandLine: "", hasInitramfs: false, hasSerial: true, restartsOnReset: true,
          replyDeadline: 1)), [])
    #expect(second.exitCode() == 1)
  }

  @Test("A back end that is not there before the start is a failure of that device")
  func deadBackEnd() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    _ = try core.configure(kernel: kernel, commandLine: "test=boot end=hang")
    let pair = try UnixSocket.pair(.stream)
    core.send(.device(DeviceAssignment(id: "blk0", deviceType: .block, pciSlot: 1, queueSizes: [256])), [pair.second.rawValue])
    // Neither end is read by anybody: the deadline of one second ends it.
    let sequence = core.send(.start(deviceCount: 1))
    guard case .failed(.device, let sentence) = try core.answer(sequence) else {
      Issue.record("not a device failure: \(core.messages)")
      return
    }
    #expect(sentence.contains("blk0"), "\(sentence)")
    #expect(core.exitCode() == 1)
  }

  @Test("A guest that looks at the PCI bus before its devices are there waits, and is reset and ended all the same")
  func shutBus() throws {
    guard let kernel = try FakeSupervisor.guest("micro.elf") else { return }
    let core = try FakeSupervisor()
    _ = try core.configure(kernel: kernel, commandLine: "test=boot,pci")
    try core.connectSerial()
    let start = core.send(.start(deviceCount: 1))
    try #require(core.waitForSerial("MICRO start"))
    usleep(100_000)
    core.readSerial()
    #expect(!core.serialOutput.contains("MICRO done"), "\(core.serialOutput)")
    guard case .refused = try core.answer(core.send(.pause)) else {
      Issue.record("a VM that is still starting was paused: \(core.messages)")
      return
    }
    #expect(try core.answer(core.send(.reboot)) == .done)
    try #require(core.waitForSerial(times: 2, "MICRO start"), "\(core.serialOutput)")
    #expect(try core.answer(core.send(.shutdown)) == .done)
    #expect(core.exitCode() == 0)
    #expect(!core.serialOutput.contains("MICRO done"), "\(core.serialOutput)")
    #expect(!core.messages.contains { $0.sequence == start }, "\(core.messages)")
  }

  @Test("Arguments are checked")
  func arguments() throws {
    #expect(try CoreArguments.parse(["--fd=3", "--title=vm/a/core"][...]).get() == CoreArguments(channel: 3, title: "vm/a/core"))
    for bad in [[], ["--fd=x"], ["--fd=-1"], ["--fd=3", "--what"]] as [[String]] {
      #expect(throws: CoreArguments.Mistake.self) { _ = try CoreArguments.parse(bad[...]).get() }
    }
  }
}
