import VirtioTransport

/// Configuration access to PCI bus 0: which function an access means. Device 0 is the host bridge; virtio functions fill
/// function 0 of devices 1 to 31 first, then function 1 of each, and so on.
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

  func target(of function: Function, deviceCount: Int) -> Target {
    if function.device == 0 { return function.number == 0 ? .hostBridge : .absent }
    let index = Int(function.number) * 31 + Int(function.device) - 1
    return index < deviceCount ? .virtio(index) : .absent
  }

  /// Whether the device of function `index` has more than one function.
  func hasSiblings(_ index: Int, deviceCount: Int) -> Bool {
    index % 31 + 31 < deviceCount
  }

  /// Bus address of function `index` as `device.function`, the way guests write it.
  static func name(of index: Int) -> String {
    let device = index % 31 + 1
    return "00:" + (device < 16 ? "0" : "") + String(device, radix: 16) + "." + String(index / 31)
  }
}
