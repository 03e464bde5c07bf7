import VMMemory

/// Why a virtqueue cannot be set up as asked.
public enum VirtqueueError: Error, Equatable, Sendable, CustomStringConvertible {
  /// The three areas of a ring.
  public enum Part: String, Sendable {
    /// Descriptor table, or packed descriptor ring.
    case descriptors = "descriptor area"
    /// Available ring, or driver event suppression.
    case driver = "driver area"
    /// Used ring, or device event suppression.
    case device = "device area"
  }

  /// The size is zero, above 32768, or for a split ring no power of two.
  case size(UInt16)
  /// An area does not have the alignment that its layout wants.
  case misaligned(Part, GuestAddress)
  /// An area does not lie wholly in one region of guest memory.
  case notMemory(Part, GuestAddress, byteCount: Int)
  /// The saved state is impossible for a ring of this size and content.
  case base(VringBase)
  /// The record of chains in flight contradicts itself or the ring; nothing is replayed from it.
  case inflight(String)

  public var description: String {
    switch self {
    case .size(let size): "A ring cannot have \(size) entries"
    case .misaligned(let part, let address): "The \(part.rawValue) at \(address) is not aligned"
    case .notMemory(let part, let address, let count):
      "The \(part.rawValue) at \(address) of \(count) bytes is not within one region of guest memory"
    case .inflight(let why): "The record of requests in flight cannot be used: \(why)"
    case .base(let base): "Ring state 0x\(String(base.rawValue, radix: 16)) is impossible for this ring"
    }
  }
}

/// What a driver did to a ring that cannot be repaired (the device needs a reset).
public enum BrokenRing: UInt8, Error, Sendable, CustomStringConvertible {
  /// The available index is further ahead than the ring has entries.
  case availableIndex
  /// The head of a chain, or a buffer id, is not below the ring's size.
  case head
  /// A head or buffer id was made available again before it was used.
  case headInFlight
  /// `next` points outside the table.
  case next
  /// A chain is longer than its table or ring: a loop.
  case tooManyDescriptors
  /// An indirect table though the feature was not negotiated.
  case indirectNotNegotiated
  /// An indirect table is empty, not a multiple of 16 bytes, or larger than any chain may be.
  case indirectByteCount
  /// An indirect descriptor in an indirect table, or one that is followed by another descriptor.
  case indirectNesting
  /// A buffer or an indirect table is not guest memory, wholly or in part.
  case notMemory
  /// A buffer for the device to read follows one for it to write.
  case order
  /// The buffers of a chain have together 2^32 bytes or more.
  case tooManyBytes
  /// The chain has more pieces than the device reserved room for.
  case tooManySegments

  public var description: String {
    switch self {
    case .availableIndex: "the available index jumped further than the ring is long"
    case .head: "a head is outside the ring"
    case .headInFlight: "a head was made available twice"
    case .next: "a descriptor points outside its table"
    case .tooManyDescriptors: "a chain is longer than its table"
    case .indirectNotNegotiated: "an indirect table was used without having been negotiated"
    case .indirectByteCount: "an indirect table has an impossible size"
    case .indirectNesting: "an indirect descriptor is nested or followed by another"
    case .notMemory: "a buffer is not guest memory"
    case .order: "a readable buffer follows a writable one"
    case .tooManyBytes: "a chain has 4 GiB or more"
    case .tooManySegments: "a chain has too many pieces"
    }
  }
}
