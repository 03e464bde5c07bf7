import BackendKit
import DiskImage
import Glibc
import HostSystem
import VirtioQueue
import VirtioSpec

/// One request, from its chain to its answer.
extension BlockQueueWorker where Engine: ~Copyable {
  @inline(__always)
  mutating func begin(_ queue: inout DeviceQueue) {
    let token = chain.token
    guard let status = unsafe chain.takeLastWritableByte() else {
      // Nowhere to say what is wrong: given back empty.
      queue.counters.errors.add(1)
      queue.ring.complete(token, written: 0)
      answered &+= 1
      return
    }
    let index = Int(token.head)
    precondition(index < depth, "A ring is no larger than the device allows.")
    // SAFETY: index < depth. The slot is free: its head is not in flight.
    let slot = unsafe slots + index
    unsafe slot.pointee.token = token
    unsafe slot.pointee.status = status.assumingMemoryBound(to: UInt8.self)
    unsafe slot.pointee.readByteCount = 0
    unsafe slot.pointee.writeByteCount = 0
    unsafe slot.pointee.block = -1
    unsafe slot.pointee.rangeCount = 0
    unsafe slot.pointee.begun = now
    unsafe slot.pointee.kind = .others
    inFlight += 1
    // Several processes have been killed with it in flight.
    if chain.isPoisoned { return refuse(index, .ioError, &queue) }

    let request = BlockRequest.take(from: &chain, limits)
    space.limiter?.took(byteCount: UInt64(request.hasData ? max(chain.readableByteCount, chain.writableByteCount) : 0))
    switch request {
    case .read(let sector):
      let byteCount = chain.writableByteCount
      unsafe slot.pointee.readByteCount = UInt32(byteCount)
      unsafe slot.pointee.kind = .reads
      unsafe transfer(index, .read, sector, chain.writable, byteCount, &queue)
    case .write(let sector):
      let byteCount = chain.readableByteCount
      unsafe slot.pointee.writeByteCount = UInt32(byteCount)
      unsafe slot.pointee.kind = .writes
      unsafe transfer(index, .write, sector, chain.readable, byteCount, &queue)
    case .flush:
      queue.counters[.flushes].add(1)
      start(index, StorageRequest(.flush), &queue)
    case .getID:
      answer(index, bytes: space.serial, &queue)
    case .getLifetime: answer(index, bytes: space.lifetime ?? [], &queue)
    case .ranges(let kind, let count): startRanges(index, count, kind, &queue)
    case .refused(let status): refuse(index, status, &queue)
    }
  }

  /// Answers with a few bytes, or as many of them as there is room for.
  private mutating func answer(_ index: Int, bytes: [UInt8], _ queue: inout DeviceQueue) {
    let room = chain.writableByteCount
    let written = unsafe bytes.withUnsafeBytes { unsafe chain.put($0) }
    answer(index, .ok, written: UInt32(written == room ? written + 1 : written), &queue)
  }

  /// A read or write over the pieces of a chain. They are copied, because the chain is filled again by the next one.
  @inline(__always)
  private mutating func transfer(
    _ index: Int, _ operation: StorageOperation, _ sector: UInt64, _ pieces: UnsafeMutableBufferPointer<iovec>, _ byteCount: Int,
    _ queue: inout DeviceQueue
  ) {
    let slot = unsafe slots + index
    let vectors: UnsafeMutablePointer<iovec>
    let count = pieces.count
    if count <= 1 {
      if count == 1 { unsafe slot.pointee.piece = pieces[0] }
      // SAFETY: slots are memory of our own that stays where it is.
      unsafe vectors = UnsafeMutableRawPointer(slot).advanced(by: MemoryLayout<RequestSlot>.offset(of: \.piece) ?? 0)
        .assumingMemoryBound(to: iovec.self)
    } else {
      guard count <= VectorPool.vectorsPerBlock, let first = pieces.baseAddress else { return refuse(index, .ioError, &queue) }
      let block = pool.take()
      unsafe slot.pointee.block = block
      unsafe vectors = pool.vectors(block)
      unsafe vectors.update(from: first, count: count)
    }
    let durable = operation == .write && space.isWriteThrough
    let request = unsafe StorageRequest(
      operation, offset: sector << 9, byteCount: UInt64(byteCount), vectors: vectors, vectorCount: count, isDurable: durable)
    guard operation == .read, let source = unsafe engine.foresee(request) else { return start(index, request, &queue) }
    // SAFETY: they are copied before there are `greatestBatch` of them.
    unsafe foreseen[foreseenCount] = ForeseenRead(slot: UInt16(truncatingIfNeeded: index), request: request, source: source)
    foreseenCount &+= 1
  }

  @inline(__always)
  mutating func start(_ index: Int, _ request: StorageRequest, _ queue: inout DeviceQueue) {
    if let outcome = engine.begin(index, request) { finish(index, outcome, &queue) }
  }

  /// Copies the ranges out, checks all of them, and begins with the first.
  private mutating func startRanges(_ index: Int, _ count: Int, _ kind: RangeKind, _ queue: inout DeviceQueue) {
    // SAFETY: count <= greatestRangeCount ranges at the slot's own place in the mapping.
    let list = unsafe rangeList(index)
    for number in 0..<count {
      guard let range = chain.takeReadable(BlockRangeSegment.self) else { return refuse(index, .ioError, &queue) }
      // Checked before any of them is done, so that a bad request changes nothing.
      if case .failure(let refusal) = range.checked(kind, limits) { return refuse(index, refusal.status, &queue) }
      unsafe list[number] = range
    }
    unsafe slots[index].nextRange = 0
    unsafe slots[index].rangeCount = UInt16(count)
    unsafe slots[index].rangeKind = kind
    continueRanges(index, &queue)
  }

  /// Begins the next range, or answers when there is none. Bounded by the number of ranges.
  private mutating func continueRanges(_ index: Int, _ queue: inout DeviceQueue) {
    let list = unsafe rangeList(index)
    while unsafe slots[index].nextRange < slots[index].rangeCount {
      let range = unsafe list[Int(slots[index].nextRange)]
      unsafe slots[index].nextRange += 1
      guard range.sectorCount > 0, case .success(var request) = unsafe range.checked(slots[index].rangeKind, limits) else {
        continue
      }
      request.isDurable = space.isWriteThrough
      switch engine.begin(index, request) {
      case nil: return
      case .done: continue
      case .failed(let error): return fail(index, error, &queue)
      }
    }
    answer(index, .ok, written: 1, &queue)
  }

  @unsafe
  private func rangeList(_ index: Int) -> UnsafeMutablePointer<BlockRangeSegment> {
    unsafe ranges.baseAddress.assumingMemoryBound(to: BlockRangeSegment.self) + index * BlockLimits.greatestRangeCount
  }

  /// The storage is done with what was begun in a slot.
  @inline(__always)
  mutating func finish(_ index: Int, _ outcome: StorageOutcome, _ queue: inout DeviceQueue) {
    switch outcome {
    case .done:
      let slot = unsafe slots + index
      if unsafe slot.pointee.rangeCount > 0 { return continueRanges(index, &queue) }
      let readByteCount = unsafe slot.pointee.readByteCount
      queue.counters.bytesWritten.add(UInt64(readByteCount))
      let writeByteCount = unsafe slot.pointee.writeByteCount
      queue.counters.bytesRead.add(UInt64(writeByteCount))
      wasLeftToWorkers = writeByteCount > 0 && writeByteCount < Self.smallWrite && !space.image.isDirect
      answer(index, .ok, written: readByteCount + 1, &queue)
    case .failed(let error): fail(index, error, &queue)
    }
  }

  private mutating func fail(_ index: Int, _ error: Errno, _ queue: inout DeviceQueue) {
    desk.complain(error, about: space.image.name)
    refuse(index, error == .notSupported ? .unsupported : .ioError, &queue)
  }

  /// The request failed. Of a read's data nothing is promised, so nothing before the status byte counts as written.
  private mutating func refuse(_ index: Int, _ status: BlockStatus, _ queue: inout DeviceQueue) {
    queue.counters.errors.add(1)
    let hasRoomBefore = unsafe slots[index].readByteCount > 0 || chain.token == slots[index].token && chain.writableByteCount > 0
    answer(index, status, written: hasRoomBefore ? 0 : 1, &queue)
  }

  /// Writes the status byte and gives the chain back; published with the batch.
  @inline(__always)
  private mutating func answer(_ index: Int, _ status: BlockStatus, written: UInt32, _ queue: inout DeviceQueue) {
    let slot = unsafe slots + index
    guard let token = unsafe slot.pointee.token, let place = unsafe slot.pointee.status else {
      preconditionFailure("A slot is answered once.")
    }
    let block = unsafe slot.pointee.block
    if block >= 0 { pool.giveBack(block) }
    // SAFETY: the byte is guest memory that the queue keeps mapped. `publish` orders it before the used index.
    unsafe place.pointee = status.rawValue
    unsafe slot.pointee.token = nil
    unsafe slot.pointee.status = nil
    unsafe slot.pointee.rangeCount = 0
    inFlight -= 1
    answered &+= 1
    queue.counters.requests.add(1)
    unsafe queue.counters.record(now &- slot.pointee.begun, in: slot.pointee.kind)
    queue.ring.complete(token, written: written)
  }
}
