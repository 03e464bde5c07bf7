/// Numbers of virtio over PCI (virtio 1.4, section 4.1; linux/virtio_pci.h, linux/pci_regs.h).
public enum VirtioPCI {
  @inlinable public static var vendorID: UInt16 { 0x1AF4 }
  /// Device id of a modern function is this plus the virtio device id.
  @inlinable public static var firstDeviceID: UInt16 { 0x1040 }
  /// Revision of a function that is not transitional.
  @inlinable public static var revision: UInt8 { 1 }
  /// Vector value that means "no interrupt", `VIRTIO_MSI_NO_VECTOR`.
  @inlinable public static var noVector: UInt16 { 0xFFFF }

  /// `cfg_type` of the vendor capabilities.
  public enum ConfigurationType: UInt8, Sendable {
    case common = 1
    case notify = 2
    case isr = 3
    case device = 4
    case pciAccess = 5
    case sharedMemory = 8
    case vendor = 9
  }

  /// Bits of the ISR status byte.
  public enum ISR {
    @inlinable public static var queue: UInt8 { 1 }
    @inlinable public static var configuration: UInt8 { 2 }
  }

  /// Byte offsets of the common configuration structure, `virtio_pci_common_cfg`.
  public enum Common {
    @inlinable public static var deviceFeatureSelect: Int { 0x00 }
    @inlinable public static var deviceFeature: Int { 0x04 }
    @inlinable public static var driverFeatureSelect: Int { 0x08 }
    @inlinable public static var driverFeature: Int { 0x0C }
    @inlinable public static var configurationVector: Int { 0x10 }
    @inlinable public static var queueCount: Int { 0x12 }
    @inlinable public static var deviceStatus: Int { 0x14 }
    @inlinable public static var configurationGeneration: Int { 0x15 }
    @inlinable public static var queueSelect: Int { 0x16 }
    @inlinable public static var queueSize: Int { 0x18 }
    @inlinable public static var queueVector: Int { 0x1A }
    @inlinable public static var queueEnable: Int { 0x1C }
    @inlinable public static var queueNotifyOffset: Int { 0x1E }
    @inlinable public static var queueDescriptors: Int { 0x20 }
    @inlinable public static var queueDriver: Int { 0x28 }
    @inlinable public static var queueDevice: Int { 0x30 }
    @inlinable public static var queueNotifyConfigData: Int { 0x38 }
    @inlinable public static var queueReset: Int { 0x3A }
    @inlinable public static var adminQueueIndex: Int { 0x3C }
    @inlinable public static var adminQueueCount: Int { 0x3E }
    /// Length without `queue_notif_config_data` and later fields.
    @inlinable public static var baseByteCount: Int { 56 }
    /// Length with `queue_notif_config_data` and `queue_reset`.
    @inlinable public static var resetByteCount: Int { 60 }
    @inlinable public static var fullByteCount: Int { 64 }
  }
}

/// Offsets and bits of PCI configuration space that a type 0 function needs (PCI 3.0; linux/pci_regs.h).
public enum PCISpec {
  @inlinable public static var vendorID: Int { 0x00 }
  @inlinable public static var deviceID: Int { 0x02 }
  @inlinable public static var command: Int { 0x04 }
  @inlinable public static var status: Int { 0x06 }
  @inlinable public static var revision: Int { 0x08 }
  @inlinable public static var classCode: Int { 0x09 }
  @inlinable public static var cacheLineSize: Int { 0x0C }
  @inlinable public static var latencyTimer: Int { 0x0D }
  @inlinable public static var headerType: Int { 0x0E }
  @inlinable public static var baseAddress0: Int { 0x10 }
  @inlinable public static var subsystemVendorID: Int { 0x2C }
  @inlinable public static var subsystemID: Int { 0x2E }
  @inlinable public static var expansionROM: Int { 0x30 }
  @inlinable public static var capabilityPointer: Int { 0x34 }
  @inlinable public static var interruptLine: Int { 0x3C }
  @inlinable public static var interruptPin: Int { 0x3D }
  /// Bytes of configuration space reachable through ports CF8/CFC, and through ECAM.
  @inlinable public static var conventionalByteCount: Int { 256 }
  @inlinable public static var extendedByteCount: Int { 4096 }

  @inlinable public static var commandIO: UInt16 { 1 << 0 }
  @inlinable public static var commandMemory: UInt16 { 1 << 1 }
  @inlinable public static var commandBusMaster: UInt16 { 1 << 2 }
  @inlinable public static var commandParity: UInt16 { 1 << 6 }
  @inlinable public static var commandSystemError: UInt16 { 1 << 8 }
  @inlinable public static var commandInterruptDisable: UInt16 { 1 << 10 }
  @inlinable public static var statusCapabilityList: UInt16 { 1 << 4 }

  @inlinable public static var capabilityVendor: UInt8 { 0x09 }
  @inlinable public static var capabilityMSIX: UInt8 { 0x11 }

  @inlinable public static var barMemory64: UInt32 { 0x4 }
  @inlinable public static var barPrefetchable: UInt32 { 0x8 }

  /// MSI-X message control.
  @inlinable public static var msixEnable: UInt16 { 1 << 15 }
  @inlinable public static var msixFunctionMask: UInt16 { 1 << 14 }
  @inlinable public static var msixTableEntryByteCount: Int { 16 }
  @inlinable public static var msixGreatestVectorCount: Int { 2048 }
}
