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
    guard let position = wish.flatMap({ occupants[$0] == nil ? $0 : nil }) ?? (wish == nil ? occupants.firstIndex(of: nil) : nil)
    else { return nil }
    occupants[position] = index
    return position
  }

  func target(of function: Function) -> Target {
    if function.device == 0 { return function.number == 0 ? .hostBridge : .absent }
    return occupants[Int(function.number) * 31 + Int(function.device) - 1].map { .virtio($0) } ?? .absent
  }

  /// Whether the device at this position has more than one function.
  func hasSiblings(_ position: Int) -> Bool {
    stride(from: position % 31 + 31, to: Self.capacity, by: 31).contains { occupants[$0] != nil }
  }

  /// Bus address of a position as `device.function`, the way guests write it.
  static func name(of position: Int) -> String {
    let device = position % 31 + 1
    return "00:" + (device < 16 ? "0" : "") + String(device, radix: 16) + "." + String(position / 31)
  }
}
