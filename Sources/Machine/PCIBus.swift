import VirtioTransport

/// Configuration access to PCI bus 0: which function an access means. Device 0 is the host bridge; without a wish, virtio
/// functions take function 0 of devices 1 to 31 first, then function 1 of each, and so on.
struct PCIBus: Sendable {
  /// Device and function number.
  struct Function: Equatable {
    var device: UInt8
    var number: UInt8
  }

  struct Place: Equatable {
    var function: Function
    /// Byte offset in configuration space.
    var register: UInt16
  }

  enum Target: Equatable {
    case absent
    case hostBridge
    case virtio(Int)
  }

  /// Functions beside the host bridge.
  static let capacity = 31 * 8

  /// The address register at port 0xCF8.
  var address: UInt32 = 0
  var hostBridge = PCIBus.makeHostBridge()

  static func makeHostBridge() -> PCIConfigurationSpace {
    PCIConfigurationSpace(
      vendorID: 0x8086, deviceID: 0x0D57, revision: 0, classCode: 0x06_0000, subsystemVendorID: 0, subsystemID: 0)
  }

  /// What the address register selects; nil while it is not enabled or names another bus.
  var selected: Place? {
    guard address & 0x8000_0000 != 0, address >> 16 & 0xFF == 0 else { return nil }
    return Place(
      function: Function(device: UInt8(address >> 11 & 31), number: UInt8(address >> 8 & 7)),
      register: UInt16(address & 0xFC))
  }

  static func place(ecamOffset offset: UInt64) -> Place {
    Place(
      function: Function(device: UInt8(offset >> 15 & 31), number: UInt8(offset >> 12 & 7)),
      register: UInt16(offset & 0xFFF))
  }

  /// Virtio device at each position, counted as above.
  private var occupants = [Int?](repeating: nil, count: PCIBus.capacity)

  /// Takes a position for virtio device `index`: function 0 of PCI device `device` if that is asked for and free, else the
  /// first free one. Nil when there is none.
  mutating func place(_ index: Int, device: UInt8?) -> Int? {
    let wish = device.flatMap { (1...31).contains($0) ? Int($0) - 1 : nil }
    guard wish == nil || !isAwaitingEjection(device ?? 0),
      let position = wish.flatMap({ occupants[$0] == nil ? $0 : nil }) ?? (wish == nil ? occupants.firstIndex(of: nil) : nil)
    else { return nil }
    occupants[position] = index
    return position
  }

  func target(of function: Function) -> Target {
    if function.device == 0 { return function.number == 0 ? .hostBridge : .absent }
    return occupants[Int(function.number) * 31 + Int(function.device) - 1].map { .virtio($0) } ?? .absent
  }

  /// The first device number without any function; nil when all have one.
  var freeDevice: UInt8? {
    for device: UInt8 in 1...31 where indices(in: device).isEmpty && !isAwaitingEjection(device) { return device }
    return nil
  }

  /// Virtio devices that are functions of one device number.
  private func indices(in device: UInt8) -> [Int] {
    stride(from: Int(device) - 1, to: Self.capacity, by: 31).compactMap { occupants[$0] }
  }

  /// Takes the function away. The guest must still let go of what was there, where it has not been asked before.
  mutating func clear(_ position: Int, isEjected: Bool) {
    occupants[position] = nil
    let slot: UInt32 = 1 << UInt32(position % 31 + 1)
    plugged &= ~slot
    requested &= ~slot
    if !isEjected { departed |= slot }
  }

  // MARK: hot plug

  /// Slots by bit: devices that have come, devices that the guest is asked to let go of (both cleared by reading), and those
  /// that went without the guest's having let go: no other device may come there before it has.
  private(set) var plugged: UInt32 = 0
  private(set) var requested: UInt32 = 0
  private var departed: UInt32 = 0

  func isAwaitingEjection(_ device: UInt8) -> Bool { departed >> UInt32(device) & 1 != 0 }

  mutating func announce(_ device: UInt8) { plugged |= 1 << UInt32(device) }
  mutating func requestEjection(_ device: UInt8) { requested |= 1 << UInt32(device) }
  mutating func takePlugged() -> UInt32 {
    defer { plugged = 0 }
    return plugged
  }
  mutating func takeRequested() -> UInt32 {
    defer { requested = 0 }
    return requested
  }

  /// The guest has let go of what is in these slots: the virtio devices there.
  mutating func eject(_ slots: UInt32) -> [Int] {
    departed &= ~slots
    var found: [Int] = []
    for device: UInt8 in 1...31 where slots >> UInt32(device) & 1 != 0 { found += indices(in: device) }
    return found
  }

  /// A guest that starts anew finds what is there by itself.
  mutating func resetHotPlug() {
    plugged = 0
    requested = 0
    departed = 0
  }

  /// Whether the device at this position has more than one function.
  func hasSiblings(_ position: Int) -> Bool {
    stride(from: position % 31 + 31, to: Self.capacity, by: 31).contains { occupants[$0] != nil }
  }
}
