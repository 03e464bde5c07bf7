import HostSystem
import VhostUser
import VirtioQueue

/// The area in which the chains in flight of all queues are recorded: one region per queue, all of one size. It comes from the
/// front end, and its content from whoever had it before.
struct InflightMemory {
  let mapping: MemoryMapping
  let queueCount: Int
  let queueSize: Int

  /// Maps an area after checking that no access to it can fail.
  init(_ description: InflightDescription, _ fd: borrowing OwnedFD, allowsUnsealed: Bool) throws(Refusal) {
    queueCount = Int(description.queueCount)
    queueSize = Int(description.queueSize)
    let least = try Self.byteCount(queueCount, queueSize, packed: false)
    let most = try Self.byteCount(queueCount, queueSize, packed: true)
    guard description.size >= UInt64(least) else {
      throw Refusal("an inflight area of \(description.size) bytes is too small for its \(queueCount) queues")
    }
    guard description.mapOffset % 4096 == 0 else { throw Refusal("an inflight area begins inside a page") }
    // What lies behind the last region is not ours and not mapped.
    let size = Int(min(description.size, UInt64(most)))
    do {
      // The sum was checked when the message was decoded.
      guard try fd.status().byteCount >= description.mapOffset + UInt64(size) else {
        throw Refusal("the file of the inflight area is shorter than the area")
      }
      let seals = SharedMemory.seals(of: fd) ?? 0
      guard allowsUnsealed || seals & 0x0002 != 0 else {  // F_SEAL_SHRINK
        throw Refusal("the inflight area is not sealed against shrinking")
      }
      mapping = try MemoryMapping.shared(fd, offset: description.mapOffset, byteCount: size)
    } catch let error as Refusal {
      throw error
    } catch let error as SystemError {
      throw Refusal("\(error)", error.errno)
    } catch {
      throw Refusal("the inflight area cannot be mapped")
    }
  }

  /// The region of a queue; nil for a queue that the area was not made for, which then goes unrecorded.
  func region(ofQueue index: Int, size: UInt16, packed: Bool) throws(Refusal) -> InflightRegion? {
    guard index < queueCount else { return nil }
    guard Int(size) <= queueSize, let longest = UInt16(exactly: queueSize) else {
      throw Refusal("the inflight area was made for queues of \(queueSize) entries, not \(size)")
    }
    // Every region has the size of the longest queue's, and a record goes by its own queue's.
    let stride = InflightRegion.byteCount(size: longest, packed: packed)
    guard let region = InflightRegion(mapping, offset: index * stride, byteCount: stride) else {
      throw Refusal("the inflight area has no room for queue \(index)")
    }
    return region
  }

  /// At most 256 queues of 32768 entries, as the session has checked, so nothing overflows.
  static func byteCount(_ queueCount: Int, _ queueSize: Int, packed: Bool) throws(Refusal) -> Int {
    guard let size = UInt16(exactly: queueSize), queueCount > 0 else { throw Refusal("an inflight area for no queue") }
    return queueCount * InflightRegion.byteCount(size: size, packed: packed)
  }
}

/// The area that is handed out on request. Made before the sandbox closes, large enough for every request; its pages come to
/// be when they are used. A second request gets the same memory, for then the first one's rings are no more.
struct InflightStore: ~Copyable {
  private let fd: OwnedFD
  private let mapping: MemoryMapping

  init(queueCount: Int, greatestQueueSize: UInt16) throws(SystemError) {
    let size = queueCount * InflightRegion.byteCount(size: greatestQueueSize, packed: true)
    let file = try SharedMemory.sealed(name: "inflight", byteCount: UInt64(size))
    mapping = try MemoryMapping.shared(file, byteCount: size)
    fd = file
  }

  borrowing func area(queueCount: Int, queueSize: Int, packed: Bool) throws(Refusal) -> InflightArea {
    let size = try InflightMemory.byteCount(queueCount, queueSize, packed: packed)
    guard size <= mapping.byteCount else { throw Refusal("an inflight area for more than the device has") }
    // SAFETY: size is within the mapping.
    unsafe mapping.baseAddress.initializeMemory(as: UInt8.self, repeating: 0, count: size)
    do {
      return InflightArea(
        description: InflightDescription(
          size: UInt64(size), mapOffset: 0, queueCount: UInt16(queueCount), queueSize: UInt16(queueSize)),
        fd: try fd.duplicate())
    } catch {
      throw Refusal("\(error)", error.errno)
    }
  }
}
