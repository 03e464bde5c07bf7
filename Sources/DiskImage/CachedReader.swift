import CLinux
import Glibc
import HostSystem

/// One thread's fast path for data that the host has cached: a copy from the mapped file instead of a system call, about three
/// times as fast.
///
/// A page is copied only when it was read or written through the kernel before, so it was cached then; should it be gone
/// meanwhile, the copy waits for the storage, which shows in its time, and the pages around go through the kernel once
/// more. A file that has become shorter makes the copy fail (`clinux_copy_guarded`) or, in the last page, bring zeros from its end on: so where
/// a page's last byte is zero, what was copied counts only after the file's size has been asked for again. Not for direct access, and only for
/// file systems whose mappings show every write at once.
@safe
struct CachedReader {
  /// Longer requests gain nothing.
  static let greatestByteCount: UInt64 = 64 << 10
  /// No copy of cached data takes as long, in cycles of the time stamp counter (some 30 us).
  private static let slow: UInt64 = 100_000
  private static let pageShift: UInt64 = 12
  private static let pagesPerWindow = Int(CachedWindows.windowByteCount >> pageShift)
  /// Bytes of the map around a page that are cleared together: 2 MiB of the file.
  private static let neighbourhood = 64

  private let windows: CachedWindows
  /// One bit for every page of every window; its own pages come to be when they are used.
  private let known: MemoryMapping

  /// Nil where the image is not fit for it.
  init?(_ image: DiskImage) {
    guard let windows = image.cachedWindows, clinux_guard_copies() == 0,
      let known = try? MemoryMapping.anonymous(byteCount: CachedWindows.limit * Self.pagesPerWindow / 8)
    else { return nil }
    self.windows = windows
    self.known = known
  }

  /// Where the data of a read lies that can be copied, as far as is known.
  @inline(__always)
  func foresee(_ request: StorageRequest) -> UnsafeRawPointer? {
    guard let (_, base) = unsafe find(request) else { return nil }
    // SAFETY: `find` has seen that the window holds the whole range.
    return unsafe base + Int(request.offset % CachedWindows.windowByteCount)
  }

  /// Copies a read, if it has not to go through the kernel.
  @inline(__always)
  func copy(_ request: StorageRequest) -> CopyOutcome {
    guard let (place, base) = unsafe find(request) else { return .no }
    return unsafe copyPieces(request, place, base)
  }

  /// The window of a read all of whose pages are known.
  @inline(__always)
  private func find(_ request: StorageRequest) -> (place: Int, base: UnsafeRawPointer)? {
    let last = request.offset &+ request.byteCount &- 1
    guard request.byteCount &- 1 < Self.greatestByteCount,
      request.offset / CachedWindows.windowByteCount == last / CachedWindows.windowByteCount,
      let (place, base) = unsafe windows.find(request.offset / CachedWindows.windowByteCount),
      isKnown(place, request.offset, last)
    else { return nil }
    return unsafe (place, base)
  }

  @inline(__always)
  private func isKnown(_ place: Int, _ first: UInt64, _ last: UInt64) -> Bool {
    var page = place &* Self.pagesPerWindow &+ Int((first % CachedWindows.windowByteCount) >> Self.pageShift)
    let end = place &* Self.pagesPerWindow &+ Int((last % CachedWindows.windowByteCount) >> Self.pageShift)
    // At most seventeen pages.
    while page <= end {
      // SAFETY: place < limit and the page lies in its window, so the bit lies in the map.
      let byte = unsafe known.baseAddress.load(fromByteOffset: page >> 3, as: UInt8.self)
      if byte & (1 << UInt8(page & 7)) == 0 { return false }
      page &+= 1
    }
    return true
  }

  @inline(__always)
  private func copyPieces(_ request: StorageRequest, _ place: Int, _ base: UnsafeRawPointer) -> CopyOutcome {
    guard let pieces = unsafe request.vectors else { return .no }
    let begin = clinux_cycles()
    var source = unsafe base + Int(request.offset % CachedWindows.windowByteCount)
    for index in 0..<request.vectorCount {
      let piece = unsafe pieces[index]
      guard let target = unsafe piece.iov_base else { return .no }
      // SAFETY: the pieces are guest memory of together `byteCount` bytes, which lie within the window; a page that is not
      // there any more ends the copy with an error.
      guard unsafe clinux_copy_guarded(target, source, piece.iov_len) == 0 else {
        forget(place, request.offset)
        return .no
      }
      unsafe source += piece.iov_len
    }
    if clinux_cycles() &- begin > Self.slow { forget(place, request.offset) }
    return unsafe request.vectorCount == 1 && Self.showsNoEnd(pieces[0], request.offset) ? .whole : .ifLongEnough
  }

  /// Whether the last byte of every page in a piece is something else than zero. A guest that changes it meanwhile deceives itself.
  @inline(__always)
  static func showsNoEnd(_ piece: iovec, _ offset: UInt64) -> Bool {
    guard let target = unsafe piece.iov_base else { return false }
    let byteCount = unsafe piece.iov_len
    var end = 4096 &- Int(offset & 4095)
    // At most seventeen pages.
    while end < byteCount {
      // SAFETY: end <= byteCount, here and below.
      if unsafe target.load(fromByteOffset: end &- 1, as: UInt8.self) == 0 { return false }
      end &+= 4096
    }
    return unsafe target.load(fromByteOffset: byteCount &- 1, as: UInt8.self) != 0
  }

  /// The kernel has just read or written this range, which is now cached.
  @inline(__always)
  func learn(_ request: StorageRequest, _ image: DiskImage) {
    guard request.byteCount &- 1 < Self.greatestByteCount else { return }
    let number = request.offset / CachedWindows.windowByteCount
    guard let (place, _) = unsafe windows.find(number) else {
      windows.map(number, of: image)
      return
    }
    // Pages that were moved in part are cached all the same.
    var page = Int((request.offset % CachedWindows.windowByteCount) >> Self.pageShift)
    let end = min(
      Int((request.offset % CachedWindows.windowByteCount &+ request.byteCount &- 1) >> Self.pageShift), Self.pagesPerWindow - 1)
    while page <= end {
      let bit = place &* Self.pagesPerWindow &+ page
      // SAFETY: as in `isKnown`.
      let byte = unsafe known.baseAddress + (bit >> 3)
      unsafe byte.storeBytes(of: byte.load(as: UInt8.self) | 1 << UInt8(bit & 7), as: UInt8.self)
      page &+= 1
    }
  }

  private func forget(_ place: Int, _ offset: UInt64) {
    let byte = (place &* Self.pagesPerWindow &+ Int((offset % CachedWindows.windowByteCount) >> Self.pageShift)) >> 3
    let first = byte / Self.neighbourhood * Self.neighbourhood
    // SAFETY: neighbourhoods divide a window's part of the map.
    unsafe memset(known.baseAddress + first, 0, Self.neighbourhood)
  }
}
