import BackendKit
import DiskImage
import HostSystem
import VirtioQueue

/// A read whose data is cached, as far as is known, and its slot.
@safe
struct ForeseenRead {
  var slot: UInt16 = 0
  var request = StorageRequest(.flush)
  /// Where its data ends in the image; 0 where that need not be looked at.
  var dataEnd: UInt64 = 0
}

/// Reads that need no storage: collected while chains are taken, so that the data of all of them is on its way to the processor at once,
/// and then copied one after another.
extension BlockQueueWorker where Engine: ~Copyable {
  mutating func copyForeseen(_ queue: inout DeviceQueue) {
    var copiedCount = 0
    var mustSeeEnd = false
    for number in 0..<foreseenCount {
      // SAFETY: foreseenCount <= greatestBatch, and copiedCount <= number; here and below.
      if number &+ 1 < foreseenCount { engine.approach(unsafe foreseen[number &+ 1].request) }
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
    let end = mustSeeEnd ? engine.fileByteCount : .max
    now = MonotonicTime.now.nanoseconds
    for number in 0..<copiedCount {
      let (slot, dataEnd) = unsafe (Int(foreseen[number].slot), foreseen[number].dataEnd)
      finish(slot, dataEnd <= end ? .done : .failed(.inputOutput), &queue)
    }
  }
}
