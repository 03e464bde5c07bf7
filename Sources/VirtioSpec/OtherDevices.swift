// Devices whose configuration space is all that the process owning the machine must know (virtio 1.4, section 5).

/// Configuration space of a file system device, `struct virtio_fs_config`, without the notification buffer size.
public struct FileSystemConfiguration: Hashable, Sendable {
  @inlinable public static var byteCount: Int { 40 }
  @inlinable public static var tagByteCount: Int { 36 }

  /// The name the guest mounts; at most 36 bytes of UTF-8, not empty.
  public let tag: String
  /// `num_request_queues`, at least 1.
  public let requestQueueCount: UInt32

  /// `nil` if the tag is empty, longer than 36 bytes or has a NUL, or if there is no request queue.
  public init?(tag: String, requestQueueCount: UInt32 = 1) {
    guard (1...Self.tagByteCount).contains(tag.utf8.count), !tag.utf8.contains(0), requestQueueCount > 0 else {
      return nil
    }
    self.tag = tag
    self.requestQueueCount = requestQueueCount
  }

  /// 40 bytes, little-endian, the tag padded with NUL.
  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    bytes.replaceSubrange(0..<tag.utf8.count, with: Array(tag.utf8))
    LittleEndian.store(requestQueueCount, to: &bytes, at: 36)
    return bytes
  }
}

/// Configuration space of a socket device, `struct virtio_vsock_config`.
public struct VsockConfiguration: Hashable, Sendable {
  @inlinable public static var byteCount: Int { 8 }
  /// Context id of the host.
  @inlinable public static var hostContextID: UInt64 { 2 }

  public let guestContextID: UInt64

  /// `nil` for the reserved ids 0, 1, 2 and all ones, and for ids of more than 32 bits.
  public init?(guestContextID: UInt64) {
    guard (3..<0xFFFF_FFFF).contains(guestContextID) else { return nil }
    self.guestContextID = guestContextID
  }

  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    LittleEndian.store(guestContextID, to: &bytes, at: 0)
    return bytes
  }
}

/// Configuration space of a balloon, `struct virtio_balloon_config`.
public struct BalloonConfiguration: Hashable, Sendable {
  /// Bytes of the whole structure.
  @inlinable public static var byteCount: Int { 16 }

  /// Byte offsets of the fields.
  public enum Offset {
    @inlinable public static var pageCount: Int { 0 }
    @inlinable public static var actual: Int { 4 }
    @inlinable public static var freePageHintCommand: Int { 8 }
    @inlinable public static var poisonValue: Int { 12 }
  }

  /// `num_pages`: wanted balloon, in 4 KiB pages.
  public var pageCount: UInt32 = 0
  /// Present balloon; the driver writes it.
  public var actual: UInt32 = 0
  /// `free_page_hint_cmd_id`
  public var freePageHintCommand: UInt32 = 0
  /// `poison_val`
  public var poisonValue: UInt32 = 0

  public init() {}

  /// The fields from the start of `bytes`. A field that does not fit is zero: a peer may know a shorter structure.
  public init(decoding bytes: [UInt8]) {
    var whole = Array(bytes.prefix(Self.byteCount))
    whole.append(contentsOf: repeatElement(0, count: Self.byteCount - whole.count))
    pageCount = LittleEndian.load(from: whole, at: Offset.pageCount)
    actual = LittleEndian.load(from: whole, at: Offset.actual)
    freePageHintCommand = LittleEndian.load(from: whole, at: Offset.freePageHintCommand)
    poisonValue = LittleEndian.load(from: whole, at: Offset.poisonValue)
  }

  /// `byteCount` bytes, little-endian, padding zero.
  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    LittleEndian.store(pageCount, to: &bytes, at: Offset.pageCount)
    LittleEndian.store(actual, to: &bytes, at: Offset.actual)
    LittleEndian.store(freePageHintCommand, to: &bytes, at: Offset.freePageHintCommand)
    LittleEndian.store(poisonValue, to: &bytes, at: Offset.poisonValue)
    return bytes
  }
}

/// Configuration space of a persistent memory device, `struct virtio_pmem_config`.
public struct PersistentMemoryConfiguration: Hashable, Sendable {
  /// Bytes of the whole structure.
  @inlinable public static var byteCount: Int { 16 }

  /// Byte offsets of the fields.
  public enum Offset {
    @inlinable public static var start: Int { 0 }
    @inlinable public static var size: Int { 8 }
  }

  /// Guest physical address.
  public var start: UInt64 = 0
  /// In bytes.
  public var size: UInt64 = 0

  public init() {}

  /// The fields from the start of `bytes`. A field that does not fit is zero: a peer may know a shorter structure.
  public init(decoding bytes: [UInt8]) {
    var whole = Array(bytes.prefix(Self.byteCount))
    whole.append(contentsOf: repeatElement(0, count: Self.byteCount - whole.count))
    start = LittleEndian.load(from: whole, at: Offset.start)
    size = LittleEndian.load(from: whole, at: Offset.size)
  }

  /// `byteCount` bytes, little-endian, padding zero.
  public func encoded() -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.byteCount)
    LittleEndian.store(start, to: &bytes, at: Offset.start)
    LittleEndian.store(size, to: &bytes, at: Offset.size)
    return bytes
  }
}
