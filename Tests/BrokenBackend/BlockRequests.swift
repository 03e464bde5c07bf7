import Glibc
import VirtioSpec

extension Session {
  /// The answer to a block request: data, then status; empty when there is no room for a status.
  func block(_ readable: [UInt8], _ room: Int) -> [UInt8] {
    if room == 0 {
      if has("no-status") { abort() }
      return []
    }
    func status(_ code: UInt8, fill: Int = 0) -> [UInt8] {
      var answer = [UInt8](repeating: 0, count: room)
      answer[has("status-first") ? 0 : room - 1] = code
      if has("status-first"), room > 1 { answer[room - 1] = 0xEE }
      return answer
    }
    guard readable.count >= 16 else {
      if has("short-header") { abort() }
      return status(1)
    }
    func number(_ offset: Int, _ count: Int) -> UInt64 { (0..<count).reduce(0) { $0 | UInt64(readable[offset + $1]) << UInt64(8 * $1) } }
    let type = BlockRequestType(rawValue: UInt32(number(0, 4)))
    let sector = number(8, 8)
    let capacity = UInt64(disk.bytes.count / 512)
    /// Whether the range lies on the disk; nil when a defect says "done".
    func isInside(_ count: UInt64) -> Bool { sector < capacity && count <= capacity - sector }
    switch type {
    case .read:
      let count = room - 1
      if count % 512 != 0 { return status(has("unaligned-ok") ? 0 : 1) }
      if !isInside(UInt64(count / 512)) {
        let isWrap = sector > 1 << 50
        let isAcross = sector < capacity
        if has(isWrap ? "wraps-ok" : isAcross ? "across-ok" : "beyond-ok") { return status(0) }
        return status(1)
      }
      if has("large-fails"), count >= 1 << 20 { return status(1) }
      if has("last-fails"), sector + UInt64(count / 512) == capacity { return status(1) }
      if has("segments-fail"), count >= 62 * 512, count < 1 << 20 { return status(1) }
      if has("read-fails") { return status(1) }
      let start = Int(sector) * 512
      var data = Array(disk.bytes[start..<start + count])
      if has("status-first") {
        data = [0] + data.dropLast()
        return data + [0xEE]
      }
      if has("read-partial") { data = data.dropLast(count / 2) + [UInt8](repeating: 0xA5, count: count / 2) }
      return data + [0]
    case .write:
      let data = Array(readable.dropFirst(16))
      if !offered.isDisjoint(with: .blockReadOnly) { return only(room, has("read-only-ok") ? 0 : 1) }
      guard data.count % 512 == 0, isInside(UInt64(data.count / 512)) else { return only(room, has("write-beyond-ok") ? 0 : 1) }
      let start = Int(sector) * 512
      if has("write-lost"), sector != 0 { return only(room, 0) }
      if has("write-torn") {
        disk.bytes.replaceSubrange(start..<start + data.count / 2, with: data.prefix(data.count / 2))
        return only(room, 0)
      }
      let place = has("write-shifted") ? (start + data.count) % (disk.bytes.count - data.count) : start
      disk.bytes.replaceSubrange(place..<place + data.count, with: data)
      if has("write-corrupt") { disk.bytes[start + data.count / 2 + 1] ^= 1 }
      return only(room, 0)
    case .flush: return only(room, has("flush-fails") ? 1 : 0)
    case .getID:
      guard room >= 21 else { return status(1) }
      return Array("broken".utf8) + [UInt8](repeating: has("id-garbage") ? 0xA5 : 0, count: 14) + [0]
    case .discard, .writeZeroes:
      guard readable.count >= 32 else { return only(room, 1) }
      let first = number(16, 8)
      let count = number(24, 4)
      let flags = number(28, 4)
      if type == .discard, flags != 0 { return only(room, has("discard-flags-ok") ? 0 : 2) }
      if type == .writeZeroes, flags & ~1 != 0 { return only(room, has("write-zeroes-flags-ok") ? 0 : 2) }
      if type == .discard, count > 1024 { return only(room, has("discard-large-ok") ? 0 : 1) }
      guard first < capacity, count <= capacity - first else { return only(room, has("discard-beyond-ok") ? 0 : 1) }
      if type == .discard { return only(room, has("discard-fails") ? 1 : 0) }
      if !has("write-zeroes-lost") {
        let extent = Int(count) * (has("write-zeroes-wide") ? 2 : 1)
        for index in Int(first) * 512..<(Int(first) + extent) * 512 { disk.bytes[index] = 0 }
      }
      return only(room, 0)
    default: return only(room, has("unknown-ok") ? 0 : 2, fills: true)
    }
  }

  private func only(_ room: Int, _ code: UInt8, fills: Bool = false) -> [UInt8] {
    [UInt8](repeating: 0, count: room - 1) + [code]
  }
}
