import Boot
import Foundation
import Glibc
import HostSystem
import KVM
import Machine
import Testing
import VMMemory
import VirtioTransport

/// How a guest ended.
enum GuestEnd: Equatable {
  case poweredOff
  case crashed(String)
  case timedOut
  /// Stopped at its n-th reset.
  case resetLimit
}

/// Runs a small guest on a machine without back ends, its serial output collected, resets done in place.
struct MicroMachine {
  var kernel: URL
  var commandLine: String
  var processors = 1
  var memory: UInt64 = 128 << 20
  var devices: [VirtioPCIFunction.Description] = []
  /// Ends the run at this reset instead of restarting.
  var resetLimit = Int.max
  var initramfs: URL? = nil
  var timeout: Duration = .seconds(30)
  /// Shows the output as it comes.
  var echo = false
  /// Called once when the output first contains the text.
  var onOutput: (text: String, action: (Machine) -> Void)? = nil
  /// Called for every event of a device.
  var onDevice: (Machine, Int, TransportEffect) -> Void = { _, _, _ in }

  /// Root of the package.
  static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()

  /// A built micro guest, or nil with a sentence when it or KVM is missing. Built by `scripts/micro-guests`.
  static func guest(_ name: String) throws -> URL? {
    guard access("/dev/kvm", R_OK | W_OK) == 0 else {
      print("skipped: /dev/kvm is missing or not accessible")
      return nil
    }
    try built.get()
    return root.appendingPathComponent(".build/micro/\(name)")
  }

  private struct BuildFailure: Error { let output: String }

  private static let built: Result<Void, any Error> = Result {
    let process = Process()
    process.executableURL = root.appendingPathComponent("scripts/micro-guests")
    let pipe = Pipe()
    process.standardOutput = pipe
    process.standardError = pipe
    try process.run()
    let output = pipe.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    guard process.terminationStatus == 0 else { throw BuildFailure(output: String(decoding: output, as: UTF8.self)) }
  }

  struct Outcome {
    var end: GuestEnd
    var output: String
    var resets: Int
    var warnings: [String]
  }

  func run() throws -> Outcome {
    let kvm = try System(adopting: OwnedFD.open("/dev/kvm", O_RDWR))
    let bits = try kvm.supportedCPUID().physicalAddressBits
    let map = try PhysicalMap(memoryByteCount: memory, addressBits: bits)
    let ram = try MachineMemory(map, name: "guest")
    let machine = try Machine(MachineConfiguration(map: map, processorCount: processors), kvm: kvm, memory: ram.memory)
    for device in devices { _ = try machine.addVirtioDevice(device) }
    try machine.startProcessors()
    defer { machine.end() }
    let file = try PayloadFile(adopting: OwnedFD.open(kernel.path, O_RDONLY))
    let ramdisk = try initramfs.map { try PayloadFile(adopting: OwnedFD.open($0.path, O_RDONLY)) }
    let plan = try BootPlan(
      configuration: BootConfiguration(
        map: map, processorIDs: (0..<processors).map(UInt32.init), commandLine: Array(commandLine.utf8)),
      kernel: file, initramfs: ramdisk)
    try plan.load(into: ram.memory, kernel: file, initramfs: ramdisk)
    try machine.waitUntilReady()
    try machine.enter(plan.entry)
    machine.resume()

    var outcome = Outcome(end: .timedOut, output: "", resets: 0, warnings: [])
    var pendingAction = onOutput
    let deadline = MonotonicTime.now.advanced(by: timeout)
    func drain() {
      machine.drainSerial { bytes in
        outcome.output += String(decoding: bytes, as: UTF8.self)
        if echo { FileHandle.standardError.write(Data(bytes)) }
        return bytes.count
      }
    }
    while MonotonicTime.now < deadline {
      try machine.wakeUp.fd.waitUntil(.readable, timeout: .milliseconds(100))
      machine.wakeUp.drain()
      drain()
      if let action = pendingAction, outcome.output.contains(action.text) {
        pendingAction = nil
        action.action(machine)
      }
      for event in machine.takeEvents() {
        switch event {
        case .powerOff:
          drain()
          outcome.end = .poweredOff
          return outcome
        case .crashed(let reason):
          drain()
          outcome.end = .crashed(reason)
          return outcome
        case .resetRequested:
          machine.pause()
          _ = machine.takeEvents()
          outcome.resets += 1
          drain()
          if outcome.resets == resetLimit {
            outcome.end = .resetLimit
            return outcome
          }
          machine.resetDevices()
          try machine.resetProcessors()
          try ram.clear()
          try plan.load(into: ram.memory, kernel: file, initramfs: ramdisk)
          try machine.enter(plan.entry)
          machine.resume()
        case .device(let index, let effect): onDevice(machine, index, effect)
        case .ejected(let index): machine.removeDevice(index)
        case .kicks(let index): machine.passKicksOn(index)
        case .warning(let text): outcome.warnings.append(text)
        }
      }
    }
    return outcome
  }
}
