import Boot
import HostSystem
import KVM
import VirtioTransport

/// Everything behind the device lock.
final class Devices {
  enum PortTarget {
    case serial
    case platform
    case pciAddress
    case pciData
    case powerManagementTimer
    /// PCI hot plug.
    case hotPlug
  }

  enum MemoryTarget {
    case ioapic
    case ecam
    /// BAR 0 of a virtio function.
    case virtio(Int)
    /// The same where the function was taken away and its guest has not let go of it yet.
    case withdrawn
  }

  /// Where the register that the address port selects is read and written.
  static let pciDataPorts: Range<UInt16> = 0xCFC..<0xD00

  let map: PhysicalMap
  /// ioeventfd length: 0 (any) where KVM takes it, which is also its faster path, otherwise 2.
  let doorbellLength: UInt32
  var ports = AddressTable<PortTarget>()
  var addresses = AddressTable<MemoryTarget>()
  var ioapic = IOAPIC()
  var serial = SerialPort()
  var platform = Platform()
  var pci = PCIBus()
  /// By index; a device that was taken out leaves its index to another.
  var virtio: [VirtioSlot?] = []
  /// Addresses of functions that were taken away, by device number, until the guest has let go of them.
  var withdrawn: [UInt8: [UInt64]] = [:]
  /// Routes of message-signalled vectors by interrupt number, from `PlatformInterrupt.pinCount` up.
  var vectorRoutes: [UInt32: MSIMessage] = [:]
  var nextInterrupt = PlatformInterrupt.pinCount
  /// Interrupt numbers of devices that were taken out.
  var freeInterrupts: [UInt32] = []
  var warningLimit = RateLimit()
  /// Accesses that left the kernel, for reports.
  var portAccesses: UInt64 = 0
  var memoryAccesses: UInt64 = 0

  init(map: PhysicalMap, doorbellLength: UInt32, hasSerialPort: Bool) {
    self.map = map
    self.doorbellLength = doorbellLength
    for port in [0x60, 0x61, 0x64, 0x70, 0x71, PlatformPort.sleepAndReset, PlatformPort.genericEvent] as [UInt16] {
      ports.insert(UInt64(port)..<UInt64(port) + 1, .platform)
    }
    if hasSerialPort { ports.insert(UInt64(PlatformPort.serial)..<UInt64(PlatformPort.serial) + 8, .serial) }
    let timer = UInt64(PlatformPort.powerManagementTimer)
    ports.insert(timer..<timer + 4, .powerManagementTimer)
    ports.insert(0xCF8..<0xCFC, .pciAddress)
    ports.insert(UInt64(Self.pciDataPorts.lowerBound)..<UInt64(Self.pciDataPorts.upperBound), .pciData)
    let hotPlug = UInt64(PlatformPort.pluggedSlots)
    ports.insert(hotPlug..<hotPlug + 12, .hotPlug)
    addresses.insert(PhysicalMap.ioapic, .ioapic)
    addresses.insert(PhysicalMap.ecam, .ecam)
  }

  // MARK: interrupts

  func apply(_ effects: [IOAPIC.Effect], _ machine: Machine) {
    for effect in effects {
      switch effect {
      case .deliver(let message):
        // A local APIC that refuses it (switched off by its owner) is the guest's affair.
        _ = try? machine.virtualMachine.signal(message)
      case .routesChanged: setRoutes(machine)
      }
    }
  }

  /// Gives KVM all routes: level-triggered pins of the I/O APIC and the vectors of the functions.
  func setRoutes(_ machine: Machine) {
    let routes = ioapic.levelRoutes + vectorRoutes.map { MSIRoute(gsi: $0.key, message: $0.value) }
    do {
      try machine.virtualMachine.setRouting(routes)
    } catch {
      machine.warn("Interrupt routing", error)
    }
  }

  func updateSerialLine(_ machine: Machine) {
    var effects: [IOAPIC.Effect] = []
    ioapic.setLine(PlatformInterrupt.serial, serial.isInterrupting, effects: &effects)
    if !effects.isEmpty { apply(effects, machine) }
  }

  func updateEventLine(_ machine: Machine) {
    var effects: [IOAPIC.Effect] = []
    ioapic.setLine(PlatformInterrupt.genericEvent, platform.genericEvents != 0, effects: &effects)
    if !effects.isEmpty { apply(effects, machine) }
  }

  func raise(_ event: UInt8, _ machine: Machine) {
    platform.genericEvents |= event
    updateEventLine(machine)
  }

  // MARK: ports

  /// Reads `width` bytes; unclaimed ports read as ones.
  func readPort(_ port: UInt16, width: Int, _ machine: Machine) -> UInt32 {
    guard let (target, offset) = ports.find(UInt64(port)) else { return .max }
    switch target {
    case .pciAddress where width == 4 && offset == 0: return pci.address
    case .pciData:
      guard let place = pci.selected else { return .max }
      return UInt32(truncatingIfNeeded: readPCI(place.function, Int(place.register) + Int(offset), width: width))
    case .powerManagementTimer:
      return Platform.powerManagementTimer >> UInt32(offset * 8)
    case .hotPlug: return readHotPlug(offset, width: width)
    default: break
    }
    // Byte-wide devices: a wider access is one access per byte, as on the bus they come from.
    var value: UInt32 = 0
    for index in 0..<min(width, 4) {
      value |= UInt32(readByte(UInt32(port) + UInt32(index), machine)) << UInt32(8 * index)
    }
    return value
  }

  private func readByte(_ port: UInt32, _ machine: Machine) -> UInt8 {
    guard port <= 0xFFFF, let (target, offset) = ports.find(UInt64(port)) else { return 0xFF }
    switch target {
    case .serial:
      let hadRoom = serial.inputRoom > 0
      let value = serial.read(UInt16(offset))
      if !hadRoom, serial.inputRoom > 0 { machine.wakeUp.signal() }
      updateSerialLine(machine)
      return value
    case .platform, .pciAddress:
      let value = platform.read(UInt16(port)) ?? 0xFF
      if port == UInt32(PlatformPort.genericEvent) { updateEventLine(machine) }
      return value
    case .powerManagementTimer:
      return UInt8(truncatingIfNeeded: Platform.powerManagementTimer >> UInt32(offset * 8))
    case .pciData, .hotPlug: return 0xFF
    }
  }

  func writePort(_ port: UInt16, width: Int, value: UInt32, _ machine: Machine) -> Platform.Request {
    guard let (target, offset) = ports.find(UInt64(port)) else { return .none }
    switch target {
    case .pciAddress where width == 4 && offset == 0:
      pci.address = value
      return .none
    case .pciData:
      if let place = pci.selected {
        writePCI(
          place.function, Int(place.register) + Int(offset), width: width, value: UInt64(value), machine)
      }
      return .none
    case .hotPlug:
      if width == 4, offset == UInt64(PlatformPort.ejectedSlots - PlatformPort.pluggedSlots) { eject(value, machine) }
      return .none
    default: break
    }
    var request = Platform.Request.none
    for index in 0..<min(width, 4) {
      let byte = UInt8(truncatingIfNeeded: value >> UInt32(8 * index))
      let outcome = writeByte(UInt32(port) + UInt32(index), byte, machine)
      if outcome != .none { request = outcome }
    }
    return request
  }

  private func writeByte(_ port: UInt32, _ value: UInt8, _ machine: Machine) -> Platform.Request {
    guard port <= 0xFFFF, let (target, offset) = ports.find(UInt64(port)) else { return .none }
    switch target {
    case .serial:
      let wasEmpty = serial.output.isEmpty
      serial.write(UInt16(offset), value)
      if wasEmpty, !serial.output.isEmpty { machine.wakeUp.signal() }
      updateSerialLine(machine)
      return .none
    case .platform, .pciAddress: return platform.write(UInt16(port), value)
    case .powerManagementTimer, .pciData, .hotPlug: return .none
    }
  }

  // MARK: memory

  /// Reads 1 to 8 bytes; unclaimed addresses read as ones.
  func readMemory(_ address: UInt64, width: Int, _ machine: Machine) -> UInt64 {
    guard let (target, offset) = addresses.find(address) else { return .max }
    switch target {
    case .ioapic: return UInt64(ioapic.read(offset: offset))
    case .ecam:
      let place = PCIBus.place(ecamOffset: offset)
      return readPCI(place.function, Int(place.register), width: width)
    case .virtio(let index):
      guard let slot = virtio[index] else { return .max }
      return slot.function.readBAR(offset: offset, width: width, isSignalled: slot.isSignalled)
    // A driver that lets go of a device resets it and waits for a status of zero, Linux's without end.
    case .withdrawn: return 0
    }
  }

  func writeMemory(_ address: UInt64, width: Int, value: UInt64, _ machine: Machine) {
    guard let (target, offset) = addresses.find(address) else { return }
    switch target {
    case .ioapic:
      var effects: [IOAPIC.Effect] = []
      ioapic.write(offset: offset, value: UInt32(truncatingIfNeeded: value), effects: &effects)
      apply(effects, machine)
    case .ecam:
      let place = PCIBus.place(ecamOffset: offset)
      writePCI(place.function, Int(place.register), width: width, value: value, machine)
    case .virtio(let index):
      guard let slot = virtio[index] else { return }
      apply(slot.function.writeBAR(offset: offset, width: width, value: value), to: slot, machine)
    case .withdrawn: break
    }
  }

  // MARK: PCI configuration space

  private func readPCI(_ function: PCIBus.Function, _ offset: Int, width: Int) -> UInt64 {
    switch pci.target(of: function) {
    case .absent: return .max
    case .hostBridge: return pci.hostBridge.read(offset: offset, width: width)
    case .virtio(let index):
      guard let slot = virtio[index] else { return .max }
      var value = slot.function.readConfigurationSpace(
        offset: offset, width: width, isSignalled: slot.isSignalled)
      // Header type, byte 0x0E: bit 7 says that the device has more than one function.
      if pci.hasSiblings(slot.position), (offset..<offset + width).contains(0x0E) {
        value |= 0x80 << UInt64(8 * (0x0E - offset))
      }
      return value
    }
  }

  private func writePCI(_ function: PCIBus.Function, _ offset: Int, width: Int, value: UInt64, _ machine: Machine) {
    switch pci.target(of: function) {
    case .absent: break
    case .hostBridge: pci.hostBridge.write(offset: offset, width: width, value: value)
    case .virtio(let index):
      guard let slot = virtio[index] else { return }
      apply(
        slot.function.writeConfigurationSpace(offset: offset, width: width, value: value), to: slot, machine)
    }
  }
}
