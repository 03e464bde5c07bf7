import CLinux
import HostSystem
import Synchronization

/// Parts of an image's file mapped for reading, shared by all queues: made on demand, at most `limit`, and kept until the end,
/// so that nobody ever copies from a window that goes away. The page tables of all of them are at most 0.2 % of that.
@safe
final class CachedWindows: Sendable {
  static let windowByteCount: UInt64 = 256 << 20
  static let limit = 16

  private struct State: ~Copyable {
    var mappings: [MemoryMapping] = []
    var isExhausted = false
  }

  private let state = Mutex(State())
  /// Number of the window plus one, by place; 0 for none. Written once, after its base.
  private let numbers = InlineArrayOfWords()
  private let bases = InlineArrayOfWords()
  private let count = Atomic<Int>(0)

  /// The place of a window that is mapped, and where it begins in memory.
  @inline(__always)
  func find(_ number: UInt64) -> (place: Int, base: UnsafeRawPointer)? {
    let count = self.count.load(ordering: .acquiring)
    for place in 0..<count where numbers.load(place) == number {
      guard let base = unsafe UnsafeRawPointer(bitPattern: UInt(bases.load(place))) else { return nil }
      return unsafe (place, base)
    }
    return nil
  }

  /// Maps a window of the file; harmless when it is mapped or cannot be.
  func map(_ number: UInt64, of image: DiskImage) {
    let start = number * Self.windowByteCount
    guard start < image.byteCount else { return }
    state.withLock { state in
      guard !state.isExhausted, unsafe find(number) == nil else { return }
      let place = state.mappings.count
      guard place < Self.limit,
        let mapping = try? MemoryMapping.shared(
          image.file, offset: start, byteCount: Int(Self.windowByteCount), writable: false)
      else {
        state.isExhausted = true
        return
      }
      // What is not cached is not to be fetched in advance.
      mapping.advise(1)  // MADV_RANDOM
      state.mappings.append(mapping)
      numbers.store(place, number)
      unsafe bases.store(place, UInt64(UInt(bitPattern: mapping.baseAddress)))
      count.store(place + 1, ordering: .releasing)
    }
  }
}

/// `CachedWindows.limit` words that any thread may load.
@safe
private final class InlineArrayOfWords: @unchecked Sendable {
  // @unchecked: every access is a single relaxed load or store, ordered by the count beside it.
  private let words: UnsafeMutableRawPointer

  init() {
    unsafe words = .allocate(byteCount: CachedWindows.limit * 8, alignment: 64)
    unsafe words.initializeMemory(as: UInt8.self, repeating: 0, count: CachedWindows.limit * 8)
  }

  deinit { unsafe words.deallocate() }

  // SAFETY: places are below `limit`.
  @inline(__always) func load(_ place: Int) -> UInt64 { unsafe clinux_load_relaxed_u64(words + place * 8) }
  func store(_ place: Int, _ value: UInt64) { unsafe clinux_store_relaxed_u64(words + place * 8, value) }
}
