import HostSystem
import VMMemory
import VirtioQueue

/// The driver's half.
extension FakeFrontEnd {
  /// A request and its answer: a chain with `readable` for the device to read and `room` bytes for it to write.
  public func request(_ readable: [UInt8] = [], room: Int = 0, queue index: Int = 0) throws(FakeFrontEndError) -> Answer {
    let head = try offer(readable, room: room, queue: index)
    let answer = try nextAnswer(queue: index)
    guard answer.head == head else { throw FakeFrontEndError("Chain \(answer.head) came back instead of \(head)") }
    return answer
  }

  /// Offers a chain without waiting; its head.
  @discardableResult
  public func offer(_ readable: [UInt8] = [], room: Int = 0, queue index: Int = 0) throws(FakeFrontEndError) -> UInt16 {
    let queue = queues[index]
    var buffers: [DriverBuffer] = []
    if !readable.isEmpty {
      let address = try allocate(readable.count)
      guard memory.copyIn(readable, at: address) else { throw FakeFrontEndError("The guest's memory is too small") }
      buffers.append(DriverBuffer(address, UInt32(readable.count), isDeviceWritable: false))
    }
    let place = try allocate(room)
    if room > 0 {
      // What the device leaves alone is recognised by it.
      _ = memory.copyIn([UInt8](repeating: 0xA5, count: room), at: place)
      buffers.append(DriverBuffer(place, UInt32(room), isDeviceWritable: true))
    }
    guard let head = queue.driver.add(buffers.span) else { throw FakeFrontEndError("Queue \(index) is full, or the chain empty") }
    queue.rooms[head] = (place, room)
    if queue.driver.publish() { queue.kick.signal() }
    return head
  }

  /// The next chain that comes back, waited for.
  public func nextAnswer(queue index: Int = 0) throws(FakeFrontEndError) -> Answer {
    guard let answer = try nextAnswer(queue: index, within: patience) else {
      throw FakeFrontEndError("Nothing came back on queue \(index) within \(patience)")
    }
    return answer
  }

  /// The next chain that comes back; nil when none does in this time.
  public func nextAnswer(queue index: Int = 0, within limit: Duration) throws(FakeFrontEndError) -> Answer? {
    let queue = queues[index]
    let end = MonotonicTime.now.advanced(by: limit)
    while true {
      switch queue.driver.nextUsed() {
      case .used(let head, let written):
        guard let room = queue.rooms.removeValue(forKey: head) else { throw FakeFrontEndError("Chain \(head) was not outstanding") }
        let count = Int(written ?? 0)
        guard count <= room.byteCount, let bytes = memory.bytes(at: room.address, count: count) else {
          throw FakeFrontEndError("Chain \(head) reports \(count) bytes written into room for \(room.byteCount)")
        }
        return Answer(bytes: bytes, head: head)
      case .broken: throw FakeFrontEndError("Queue \(index): the device returns chains that are not outstanding")
      case .empty: break
      }
      if queue.error.isSignalledNow() { throw FakeFrontEndError("Queue \(index): the device says that the ring is broken") }
      // Sleeps as a driver does: a device that forgets to call is found out.
      if queue.driver.enableCalls() { continue }
      let now = MonotonicTime.now
      guard now < end else { return nil }
      _ = try? queue.call.fd.waitUntil(.readable, timeout: end.since(now))
      queue.call.drain()
      queue.driver.disableCalls()
    }
  }

  /// Guest memory that was not used lately.
  private func allocate(_ byteCount: Int) throws(FakeFrontEndError) -> GuestAddress {
    let end = Self.guestStart + UInt64(setup.memoryByteCount)
    if nextFree + UInt64(byteCount) > end { nextFree = firstBuffer }
    guard nextFree + UInt64(byteCount) <= end else { throw FakeFrontEndError("The guest's memory is too small for \(byteCount) bytes") }
    defer { nextFree = (nextFree + UInt64(byteCount) + 63) & ~63 }
    return GuestAddress(nextFree)
  }
}
