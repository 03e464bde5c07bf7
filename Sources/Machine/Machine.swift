// Machine: address map, PCI, interrupt routing, serial port, processors. It turns what a guest does (port and memory
// accesses, interrupts, resets) into device state and events, and knows nothing of back ends: what a virtio device must do
// with its queues leaves as an event, to be handled by the thread that owns the sessions.
//
// Two locks. The device lock guards everything a guest access may touch and is held for the length of one access; nothing
// under it waits. The control gate guards whether processors run. No thread takes the gate while it holds the device lock.
//
//   let machine = try Machine(configuration, kvm: system, memory: memory)
//   try machine.prepareProcessors()           // threads exist and wait from here on
//   try machine.load(entry: plan.entry)
//   machine.resume()

import Boot
import CLinux
import HostSystem
import KVM
import VMMemory
import VirtioTransport

/// What a machine is built from.
package struct MachineConfiguration: Sendable {
  package var map: PhysicalMap
  package var processorCount: Int
  package var hasSerialPort: Bool

  package init(map: PhysicalMap, processorCount: Int, hasSerialPort: Bool = true) {
    self.hasSerialPort = hasSerialPort
    self.map = map
    self.processorCount = processorCount
  }
}

/// What happened in the guest and concerns those outside the machine.
package enum MachineEvent: Sendable {
  /// The guest asked for a reset; all processors are being paused.
  case resetRequested
  /// The guest switched itself off; all processors are being paused.
  case powerOff
  /// A processor cannot go on; all processors are being paused. The text says why, and where it was.
  case crashed(String)
  /// Something a virtio device must do; see `TransportEffect`. Interrupt and address effects never appear here.
  case device(Int, TransportEffect)
  /// The guest has let go of a device, which is off the bus now.
  case ejected(Int)
  /// Doorbells of a device that KVM does not pass on: `passKicksOn`.
  case kicks(Int)
  /// An oddity that was absorbed; worth a log line.
  case warning(String)
}

/// One virtual machine with its devices and processors.
package final class Machine: @unchecked Sendable {
  // @unchecked: `devices` is touched under `deviceLock` only, `events` under `eventLock`; the rest never changes after
  // init, save the processors' own state, which follows the rules of `Processor`.

  package let map: PhysicalMap
  package let memory: GuestMemory
  let virtualMachine: VirtualMachine
  let processors: [Processor]
  let deviceLock = Gate()
  let devices: Devices
  let control: ProcessorControl
  /// Signalled when `takeEvents` has something, or the serial port has output.
  package let wakeUp: EventFD
  private let eventLock = Gate()
  private var events = MachineEventQueue()
  let boot: ProcessorBoot

  /// Creates the VM, its memory slots and processors. Interrupt controllers and memory first, as KVM wants it.
  /// - Parameter cpuid: `kvm.supportedCPUID()` where the caller has it already; asking takes a moment.
  package init(
    _ configuration: MachineConfiguration, kvm: borrowing System, cpuid: CPUIDTable? = nil, memory: GuestMemory
  ) throws(MachineError) {
    let count = configuration.processorCount
    do {
      let missing = kvm.missingCapabilities()
      guard missing.isEmpty else { throw KVMError.missingCapabilities(missing) }
      let virtualMachine = try kvm.createVirtualMachine()
      let maximum = min(virtualMachine.value(of: .maximumVCPUs), Self.processorLimit)
      guard count >= 1, count <= maximum else { throw MachineError.processorCount(count, maximum: maximum) }
      try virtualMachine.reservePages(tss: PhysicalMap.kvmTSS, identityMap: PhysicalMap.kvmIdentityMap)
      try virtualMachine.enableSplitInterruptController(pinCount: PlatformInterrupt.pinCount)
      let needsX2APIC = count > 255
      let hasX2APIC = virtualMachine.value(of: .x2APIC) & 3 == 3
      guard hasX2APIC || !needsX2APIC else { throw MachineError.processorCount(count, maximum: 255) }
      if hasX2APIC { try virtualMachine.enableX2APIC() }
      for (slot, region) in memory.regions.enumerated() {
        // SAFETY: the region is mapped as long as `memory` lives, and the machine keeps it.
        guard let host = unsafe memory.translate(region.guestAddress, byteCount: region.byteCount) else {
          throw MachineError.memory(region.guestAddress.rawValue)
        }
        try unsafe virtualMachine.setMemory(
          slot: UInt32(slot), guestAddress: region.guestAddress.rawValue, host: host, byteCount: region.byteCount)
      }
      boot = try ProcessorBoot(
        kvm: kvm, machine: virtualMachine, cpuid: cpuid ?? kvm.supportedCPUID(), processorCount: count,
        usesX2APIC: needsX2APIC)
      try Kick.installHandler()
      var processors: [Processor] = []
      processors.reserveCapacity(count)
      for id in 0..<UInt32(count) {
        processors.append(
          Processor(
            id: id, vcpu: try virtualMachine.createVCPU(id: id, runByteCount: kvm.runByteCount)))
      }
      self.processors = processors
      devices = Devices(
        map: configuration.map, doorbellLength: virtualMachine.value(of: .ioeventfdAnyLength) > 0 ? 0 : 2,
        hasSerialPort: configuration.hasSerialPort)
      wakeUp = try EventFD()
      self.virtualMachine = virtualMachine
    } catch let error as MachineError {
      throw error
    } catch let error as KVMError {
      throw .kvm(error)
    } catch let error as SystemError {
      throw .system(error)
    } catch {
      throw .memory(0)
    }
    map = configuration.map
    self.memory = memory
    control = ProcessorControl(processorCount: count)
  }

  /// Processors that tables and ids are made for.
  package static let processorLimit = 1024

  // MARK: events

  func post(_ event: MachineEvent) {
    eventLock.withLock { events.append(event) }
    wakeUp.signal()
  }

  func dropEvents(ofDevice index: Int) { eventLock.withLock { events.drop(device: index) } }

  /// Takes all events in order of their happening.
  package func takeEvents() -> [MachineEvent] {
    eventLock.withLock { events.takeAll() }
  }

  // MARK: platform

  /// Presses the power button: the guest's operating system is told and decides.
  package func pressPowerButton() {
    deviceLock.withLock { devices.raise(GenericEvent.powerButton, self) }
  }

  /// Sends a non-maskable interrupt to the first processor.
  package func injectNMI() throws(MachineError) {
    do { try processors[0].vcpu.injectNMI() } catch { throw .kvm(error) }
  }

  /// Continues the guest's paravirtual clock exactly at `nanoseconds`. Only while all processors are paused.
  package func setClock(_ nanoseconds: UInt64) throws(MachineError) {
    do { try virtualMachine.setClock(nanoseconds) } catch { throw .kvm(error) }
  }

  /// Accesses of the guest that left the kernel, since the start: to ports and to memory addresses.
  package var accessCounts: (ports: UInt64, memory: UInt64) {
    deviceLock.withLock { (devices.portAccesses, devices.memoryAccesses) }
  }

  /// The guest's paravirtual clock, in nanoseconds.
  package func clock() throws(MachineError) -> UInt64 {
    do { return try virtualMachine.clock() } catch { throw .kvm(error) }
  }
}
