import BackendKit
import CLinux
import DiskImage
import HostSystem
import VirtioQueue

/// A read whose data is cached, as far as is known, and its slot.
@safe
struct ForeseenRead {
  var slot: UInt16 = 0
  var request = StorageRequest(.flush)
  /// Its data as it is mapped; only to be asked for in advance.
  var source: UnsafeRawPointer?
  /// Where its data ends in the image; 0 where that need not be looked at.
  var dataEnd: UInt64 = 0
}

/// Reads that need no storage: collected while chains are taken, and then copied one after another. Random pages are in no cache of the
/// processor, and its way to each leads through the page tables. Asked for between two chains such an address holds up everything behind it; asked
/// for one behind the other all of them are on their way together.
extension BlockQueueWorker where Engine: ~Copyable {
  mutating func copyForeseen(_ queue: inout DeviceQueue) {
    var copiedCount = 0
    var mustSeeEnd = false
    // SAFETY: foreseenCount <= greatestBatch, and copiedCount <= number; an address asked for in advance is not accessed; here and below.
    for number in 0..<foreseenCount { unsafe clinux_prefetch(foreseen[number].source, 0, 2) }
    unsafe clinux_prefetch(foreseen[0].source, 2, 16)
    for number in 0..<foreseenCount {
      if number &+ 1 < foreseenCount { unsafe clinux_prefetch(foreseen[number &+ 1].source, 2, 16) }
      var read = unsafe foreseen[number]
      switch engine.copy(read.request) {
      case .no:
        start(Int(read.slot), read.request, &queue)
        continue
      case .ifLongEnough:
        mustSeeEnd = true
        read.dataEnd = read.request.offset &+ read.request.byteCount
      case .whole: break
      }
      unsafe foreseen[copiedCount] = read
      copiedCount &+= 1
    }
    foreseenCount = 0
    guard copiedCount > 0 else { return }
    // What was copied counts if the file is still as long as it was, where that has to be asked.
    let end = mustSeeEnd ? engine.wholeByteCount : .max
    now = MonotonicTime.now.nanoseconds
    for number in 0..<copiedCount {
      let (slot, dataEnd) = unsafe (Int(foreseen[number].slot), foreseen[number].dataEnd)
      finish(slot, dataEnd <= end ? .done : .failed(.inputOutput), &queue)
    }
  }
}
