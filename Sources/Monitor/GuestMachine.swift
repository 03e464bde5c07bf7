import Boot
import ControlProtocol
import FrontEnd
import HostSystem
import KVM
import Machine
import Sandbox
import VMMemory
import VhostUser

/// The VM built from a configuration: machine, memory and payload. Can be started, and started again.
final class GuestMachine {
  let machine: Machine
  /// What back ends are told of guest memory.
  let sharedMemory: SharedGuestMemory
  private let ram: MachineMemory
  var memory: GuestMemory { ram.memory }
  private let plan: BootPlan
  private let kernel: PayloadFile
  private let initramfs: PayloadFile?

  /// Order matters for speed: the processors' threads set their processors up while the payload is being read.
  init(
    _ configuration: CoreConfiguration, kvm: consuming OwnedFD, kernel kernelFD: consuming OwnedFD,
    initramfs initramfsFD: consuming OwnedFD?, walls: WallMode = .off
  ) throws(CoreError) {
    let system = try Self.system(kvm)
    let cpuid = try Self.cpuid(system)
    let map = try Self.map(cpuid, configuration.memorySize)
    let kernel = try Self.payload(kernelFD, "Kernel")
    let initramfs: PayloadFile?
    if let fd = initramfsFD { initramfs = try Self.payload(fd, "Initramfs") } else { initramfs = nil }
    // Looked at before anything is built: most mistakes of users are here.
    do {
      plan = try BootPlan(
        configuration: BootConfiguration(
          map: map, processorIDs: (0..<UInt32(configuration.cpuCount)).map { $0 },
          commandLine: Array(configuration.commandLine.utf8), hasSerialPort: configuration.hasSerial),
        kernel: kernel, initramfs: initramfs)
    } catch {
      throw CoreError(error)
    }

    ram = try Self.memory(map)
    do {
      machine = try Machine(
        MachineConfiguration(
          map: map, processorCount: Int(configuration.cpuCount), hasSerialPort: configuration.hasSerial),
        kvm: system, cpuid: cpuid, memory: ram.memory)
      sharedMemory = SharedGuestMemory(
        regions: ram.memory.regions.map { ($0.guestAddress.rawValue, $0.byteCount, $0.fileOffset) },
        file: try Self.shared(ram.fd))
      try machine.startProcessors { () throws(SystemError) in
        do throws(SandboxError) { try ProcessWalls.closeCallsOfThread([.processor], walls) } catch { throw error.systemError }
      }
    } catch {
      throw CoreError(error)
    }
    self.kernel = kernel
    self.initramfs = initramfs
    do {
      try plan.load(into: ram.memory, kernel: kernel, initramfs: initramfs)
    } catch {
      machine.end()
      throw CoreError(error)
    }
    do {
      try machine.waitUntilReady()
    } catch {
      machine.end()
      throw CoreError(error)
    }
  }

  private static func system(_ kvm: consuming OwnedFD) throws(CoreError) -> System {
    do { return try System(adopting: kvm) } catch { throw CoreError(error) }
  }

  private static func cpuid(_ system: borrowing System) throws(CoreError) -> CPUIDTable {
    do { return try system.supportedCPUID() } catch { throw CoreError(error) }
  }

  private static func map(_ cpuid: CPUIDTable, _ byteCount: UInt64) throws(CoreError) -> PhysicalMap {
    do {
      return try PhysicalMap(memoryByteCount: byteCount, addressBits: cpuid.physicalAddressBits)
    } catch {
      throw CoreError(error)
    }
  }

  private static func memory(_ map: PhysicalMap) throws(CoreError) -> MachineMemory {
    do { return try MachineMemory(map, name: "martlet-guest") } catch { throw CoreError(error) }
  }

  private static func shared(_ fd: borrowing OwnedFD) throws(MachineError) -> SharedDescriptor {
    do { return try SharedDescriptor(duplicating: fd) } catch { throw .system(error) }
  }

  private static func payload(_ fd: consuming OwnedFD, _ what: String) throws(CoreError) -> PayloadFile {
    do {
      return try PayloadFile(adopting: fd)
    } catch {
      throw .input("\(what) is not a regular file that can be read (\(Errno(error.errno).name)); give another.")
    }
  }

  /// Puts the first processor at the kernel's entry. Only while paused, with the payload loaded.
  func enterPayload() throws(CoreError) {
    do { try machine.enter(plan.entry) } catch { throw CoreError(error) }
  }

  /// Memory, platform and processors as before the first run, the payload loaded again. Only while all processors are
  /// paused and no back end works on a ring.
  func startOver() throws(CoreError) {
    do {
      try ram.clear()
      try machine.resetProcessors()
    } catch {
      throw CoreError(error)
    }
    do {
      try plan.load(into: ram.memory, kernel: kernel, initramfs: initramfs)
    } catch {
      throw CoreError(error)
    }
    try enterPayload()
  }
}
