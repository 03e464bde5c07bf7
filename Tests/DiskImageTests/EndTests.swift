import CLinux
import DiskImage
import Foundation
import HostSystem
import Synchronization
import TestSupport
import Testing

/// Images that others make longer or shorter.
@Suite struct EndTests {
  private static let blockByteCount = 4096

  /// What block `number` of an image holds: no byte of it is zero.
  private static func block(_ number: Int) -> [UInt8] { (0..<blockByteCount).map { UInt8(1 + ($0 &+ number &* 7) % 255) } }

  private static func makeImage(_ blockCount: Int) -> String {
    let path = "/tmp/martlet-end-" + UUID().uuidString
    _ = FileManager.default.createFile(atPath: path, contents: Data((0..<blockCount).flatMap(block)))
    return path
  }

  @Test("Whoever is refused an image, or is to serve it later, leaves what its holder adds alone", arguments: [false, true])
  func longerMeanwhile(isLater: Bool) throws {
    let path = Self.makeImage(1)
    defer { unlink(path) }
    let holder = try DiskImage.open(path, .init())
    let isOver = Atomic(false)
    let attempts = Atomic(0)
    let opener = Thread {
      while !isOver.load(ordering: .relaxed) {
        attempts.add(1, ordering: .relaxed)
        guard isLater else {
          #expect(throws: DiskImageError.self) { try DiskImage.open(path, .init()) }
          continue
        }
        var options = DiskImage.Options(isLockedLater: true)
        options.isLocked = true
        _ = try? DiskImage.open(path, options)
      }
    }
    opener.start()
    var count = 1
    while count < 5000 || attempts.load(ordering: .relaxed) < 200 && count < 200_000 {
      let number = count
      count += 1
      let bytes = Self.block(number)
      let written = bytes.withUnsafeBytes { pwrite(holder.file.rawValue, $0.baseAddress, $0.count, number * Self.blockByteCount) }
      #expect(written == bytes.count)
    }
    isOver.store(true, ordering: .relaxed)
    while !opener.isFinished { usleep(1000) }
    let content = FileManager.default.contents(atPath: path) ?? Data()
    #expect(content.count == count * Self.blockByteCount)
    check((0..<count).allSatisfy { Array(content[$0 * Self.blockByteCount..<($0 + 1) * Self.blockByteCount]) == Self.block($0) })
  }

  /// One block's request, to its end.
  private static func perform<Engine: StorageEngine & ~Copyable>(
    _ engine: inout Engine, _ operation: StorageOperation, _ number: Int, _ memory: UnsafeMutableRawPointer
  ) -> StorageOutcome {
    var piece = iovec(iov_base: memory, iov_len: blockByteCount)
    return withUnsafeMutablePointer(to: &piece) { piece in
      let request = StorageRequest(
        operation, offset: UInt64(number * blockByteCount), byteCount: UInt64(blockByteCount), vectors: piece, vectorCount: 1)
      if let outcome = engine.begin(0, request) { return outcome }
      while true {
        engine.turn(waiting: true)
        while let event = engine.nextEvent() { if case .completed(0, let outcome) = event { return outcome } }
      }
    }
  }

  private static func cutOff<Engine: StorageEngine & ~Copyable>(_ path: String, _ image: DiskImage, _ engine: inout Engine) throws {
    let memory = UnsafeMutableRawPointer.allocate(byteCount: blockByteCount, alignment: 4096)
    defer { memory.deallocate() }
    func write(_ number: Int) -> StorageOutcome {
      block(number).withUnsafeBytes { memory.copyMemory(from: $0.baseAddress ?? UnsafeRawPointer(memory), byteCount: blockByteCount) }
      return perform(&engine, .write, number, memory)
    }
    func read(_ number: Int) -> [UInt8]? {
      memset(memory, 0xEE, blockByteCount)
      guard perform(&engine, .read, number, memory) == .done else { return nil }
      return Array(UnsafeRawBufferPointer(start: memory, count: blockByteCount))
    }
    #expect(write(100) == .done && write(63) == .done)
    truncate(path, 64 * blockByteCount)
    #expect(write(200) == .failed(.inputOutput))
    #expect(write(64) == .failed(.inputOutput))
    #expect(try image.file.status().byteCount == UInt64(64 * blockByteCount), "no write made it longer")
    // What is there is served as ever.
    #expect(read(63) == block(63) && write(62) == .done && read(62) == block(62))
    #expect(read(64) == nil && read(150) == nil)
    #expect(perform(&engine, .zero, 80, memory) == .failed(.inputOutput))
    // It is meant so.
    #expect(try image.lookAgain())
    #expect(image.byteCount == UInt64(64 * blockByteCount))
    truncate(path, 128 * blockByteCount)
    #expect(try image.lookAgain())
    #expect(write(100) == .done && read(100) == block(100) && read(99) == [UInt8](repeating: 0, count: blockByteCount))
    #expect(perform(&engine, .flush, 0, memory) == .done)
  }

  @Test("A write behind the end of an image that was cut off is an error, and makes it no longer")
  func cutOffByRing() throws {
    let path = Self.makeImage(256)
    defer { unlink(path) }
    let image = try DiskImage.open(path, .init())
    var engine: RingEngine
    do { engine = try RingEngine(image, depth: 8) } catch { return }
    try Self.cutOff(path, image, &engine)
  }

  @Test("The same with ordinary calls")
  func cutOffByCalls() throws {
    let path = Self.makeImage(256)
    defer { unlink(path) }
    let image = try DiskImage.open(path, .init())
    var engine = try ThreadEngine(image, depth: 8)
    try Self.cutOff(path, image, &engine)
  }

  /// Reads and writes, eight at a time, until half a second after the image was cut off. Every block holds what it always holds, so
  /// whatever is read must be that.
  private static func cutOffUnderLoad<Engine: StorageEngine & ~Copyable>(_ path: String, _ engine: inout Engine, _ seed: UInt64) {
    let (depth, blockCount) = (8, 256)
    let memory = UnsafeMutableRawPointer.allocate(byteCount: depth * blockByteCount, alignment: 4096)
    let pieces = UnsafeMutablePointer<iovec>.allocate(capacity: depth)
    defer {
      memory.deallocate()
      pieces.deallocate()
    }
    var random = SeededRandom(seed)
    var numbers = [Int](repeating: 0, count: depth)
    var isRead = [Bool](repeating: false, count: depth)
    var free = Array(0..<depth)
    var (wrong, failed) = (0, 0)
    let cut = MonotonicTime.now.advanced(by: .milliseconds(Int64.random(in: 5...30, using: &random)))
    let cutter = Thread {
      while MonotonicTime.now < cut {}
      truncate(path, Int.random(in: 1..<blockCount / 2) * blockByteCount)
    }
    cutter.start()
    func ended(_ slot: Int, _ outcome: StorageOutcome) {
      free.append(slot)
      guard outcome == .done else {
        failed += 1
        return
      }
      guard isRead[slot] else { return }
      let bytes = UnsafeRawBufferPointer(start: memory + slot * blockByteCount, count: blockByteCount)
      if !bytes.elementsEqual(block(numbers[slot])) { wrong += 1 }
    }
    let end = cut.advanced(by: .milliseconds(30))
    while MonotonicTime.now < end || free.count < depth {
      while MonotonicTime.now < end, let slot = free.popLast() {
        let place = memory + slot * blockByteCount
        // The very end is left alone: a write to it makes the image as long as it was.
        numbers[slot] = Int.random(in: 0..<blockCount - 1, using: &random)
        isRead[slot] = Bool.random(using: &random)
        if isRead[slot] { memset(place, 0xEE, blockByteCount) }
        if !isRead[slot] { place.copyMemory(from: block(numbers[slot]), byteCount: blockByteCount) }
        pieces[slot] = iovec(iov_base: place, iov_len: blockByteCount)
        let request = StorageRequest(
          isRead[slot] ? .read : .write, offset: UInt64(numbers[slot] * blockByteCount), byteCount: UInt64(blockByteCount),
          vectors: pieces + slot, vectorCount: 1)
        if let outcome = engine.begin(slot, request) { ended(slot, outcome) }
      }
      engine.turn(waiting: free.count < depth)
      while let event = engine.nextEvent() { if case .completed(let slot, let outcome) = event { ended(slot, outcome) } }
    }
    #expect(wrong == 0, "\(wrong) blocks were read that nobody wrote, seed \(seed)")
    #expect(failed > 0)
  }

  @Test("No wrong byte is read of an image that is cut off under reads and writes", arguments: 0..<20)
  func cutOffUnderLoad(seed: Int) throws {
    let path = Self.makeImage(256)
    defer { unlink(path) }
    let image = try DiskImage.open(path, .init())
    if seed % 2 == 0, var engine = try? RingEngine(image, depth: 8) {
      Self.cutOffUnderLoad(path, &engine, UInt64(seed))
    } else {
      var engine = try ThreadEngine(image, depth: 8)
      Self.cutOffUnderLoad(path, &engine, UInt64(seed))
    }
  }

  @Test("A disk is a whole number of the guest's blocks, and at least one")
  func wholeBlocks() throws {
    let path = Self.makeImage(16)
    defer { unlink(path) }
    truncate(path, 16 * 4096 + 512)
    var options = DiskImage.Options()
    options.unit = 4096
    do {
      let image = try DiskImage.open(path, options)
      #expect(image.byteCount == 16 * 4096)
      truncate(path, 17 * 4096 + 3584)
      #expect(try image.lookAgain())
      #expect(image.byteCount == 17 * 4096)
    }
    truncate(path, 512)
    #expect(throws: DiskImageError.self) { try DiskImage.open(path, options) }
  }

  @Test("A reader is refused where QEMU writes, and not beside another reader of QEMU's or ours")
  func readersAndQEMU() throws {
    let path = Self.makeImage(4)
    defer { unlink(path) }
    /// Locks as QEMU does for what it uses (bits from byte 100 on) and what it does not share (from 200 on).
    func qemu(_ used: [Int64], _ unshared: [Int64]) throws -> OwnedFD {
      let fd = try OwnedFD.open(path, O_RDWR)
      for byte in used.map({ 100 + $0 }) + unshared.map({ 200 + $0 }) {
        #expect(clinux_ofd_lock_range(fd.rawValue, CInt(F_RDLCK), byte, 1) == 0)
      }
      return fd
    }
    let reader = DiskImage.Options(isReadOnly: true)
    do {
      let writer = try qemu([0, 1, 3], [0, 1, 2, 3])
      #expect(throws: DiskImageError.self) { try DiskImage.open(path, reader) }
      _ = consume writer
    }
    let other = try qemu([0], [1, 3])
    let first = try DiskImage.open(path, reader)
    let second = try DiskImage.open(path, reader)
    #expect(first.byteCount == second.byteCount)
    _ = consume other
  }

  @Test("Zeroes keep their storage where the file system has no way to zero, and give it back with unmap")
  func zeroesOnMemory() throws {
    let path = "/dev/shm/martlet-zeroes-" + UUID().uuidString
    defer { unlink(path) }
    _ = FileManager.default.createFile(atPath: path, contents: Data(repeating: 7, count: 1 << 20))
    let image = try DiskImage.open(path, .init())
    var engine = try ThreadEngine(image, depth: 8)
    func allocated() throws -> Int {
      var status = stat()
      stat(path, &status)
      return Int(status.st_blocks) * 512
    }
    func perform(_ operation: StorageOperation) -> StorageOutcome {
      if let outcome = engine.begin(0, StorageRequest(operation, offset: 0, byteCount: 512 << 10)) { return outcome }
      while true {
        engine.turn(waiting: true)
        while let event = engine.nextEvent() { if case .completed(0, let outcome) = event { return outcome } }
      }
    }
    for _ in 0..<2 {
      #expect(perform(.zero) == .done)
      #expect(try allocated() == 1 << 20)
      check(FileManager.default.contents(atPath: path)?.prefix(512 << 10).allSatisfy { $0 == 0 } ?? false)
    }
    #expect(perform(.zeroAndUnmap) == .done)
    #expect(try allocated() == 512 << 10)
  }
}
