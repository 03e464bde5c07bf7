import CLinux
import DiskImage
import Foundation
import HostSystem
import TestSupport
import Testing

/// A raw image in /tmp that goes away with its owner.
private final class ImageFile {
  let path = "/tmp/martlet-image-" + UUID().uuidString
  init(byteCount: Int) {
    _ = FileManager.default.createFile(atPath: path, contents: nil)
    truncate(path, byteCount)
  }
  deinit { unlink(path) }
  func open(_ options: DiskImage.Options = .init()) throws -> DiskImage { try DiskImage.open(path, options) }
  func begin(with bytes: [UInt8]) throws {
    let file = try FileHandle(forWritingTo: URL(fileURLWithPath: path))
    try file.write(contentsOf: bytes)
  }
  var content: [UInt8] { FileManager.default.contents(atPath: path).map { Array($0) } ?? [] }
}

private final class Memory {
  let base: UnsafeMutableRawPointer
  let vectors: UnsafeMutablePointer<iovec>
  init(_ count: Int, pieces: [Int], shift: Int = 0) {
    base = .allocate(byteCount: count + shift + 4096, alignment: 4096)
    vectors = .allocate(capacity: max(1, pieces.count))
    var at = base + shift
    for (index, length) in pieces.enumerated() {
      (vectors + index).initialize(to: iovec(iov_base: at, iov_len: length))
      at += length
    }
    self.shift = shift
    self.count = count
  }
  let shift: Int
  let count: Int
  deinit {
    base.deallocate()
    vectors.deallocate()
  }
  var bytes: [UInt8] {
    get { Array(UnsafeRawBufferPointer(start: base + shift, count: count)) }
    set { newValue.withUnsafeBytes { (base + shift).copyMemory(from: $0.baseAddress ?? UnsafeRawPointer(base), byteCount: count) } }
  }
}

private func pattern(_ count: Int, _ seed: UInt64) -> [UInt8] {
  var random = SeededRandom(seed)
  return (0..<count).map { _ in UInt8.random(in: 0...255, using: &random) }
}

/// Does one request to its end.
private func perform<Engine: StorageEngine & ~Copyable>(_ engine: inout Engine, _ slot: Int, _ request: StorageRequest) -> StorageOutcome {
  if let outcome = engine.begin(slot, request) { return outcome }
  for _ in 0..<100_000 {
    engine.turn(waiting: true)
    while let event = engine.nextEvent() {
      if case .completed(slot, let outcome) = event { return outcome }
    }
  }
  return .failed(.timedOut)
}

/// The same promises for both engines.
private func keepsItsPromises<Engine: StorageEngine & ~Copyable>(
  _ file: ImageFile, _ image: DiskImage, _ engine: inout Engine
) throws {
  // Pieces of odd lengths at odd addresses.
  for (round, shift) in [0, 1, 512, 777].enumerated() {
    let total = 300 * 512
    let out = Memory(total, pieces: [1, 510, 4096, 1, total - 4608], shift: shift)
    out.bytes = pattern(total, UInt64(round))
    let written = perform(
      &engine, round, StorageRequest(.write, offset: 4096, byteCount: UInt64(total), vectors: out.vectors, vectorCount: 5))
    #expect(written == .done)
    check(Array(file.content[4096..<(4096 + total)]) == pattern(total, UInt64(round)), "written, shift \(shift)")
    let back = Memory(total, pieces: [total - 1000, 999, 1], shift: shift)
    let read = perform(
      &engine, round, StorageRequest(.read, offset: 4096, byteCount: UInt64(total), vectors: back.vectors, vectorCount: 3))
    #expect(read == .done)
    check(back.bytes == pattern(total, UInt64(round)), "read, shift \(shift)")
  }
  // More than the bounce memory and in one piece.
  let big = Memory(1 << 20, pieces: [1 << 20], shift: 3)
  big.bytes = pattern(1 << 20, 9)
  #expect(perform(&engine, 0, StorageRequest(.write, offset: 0, byteCount: 1 << 20, vectors: big.vectors, vectorCount: 1)) == .done)
  check(Array(file.content[..<(1 << 20)]) == pattern(1 << 20, 9), "a large write")
  #expect(perform(&engine, 0, StorageRequest(.flush)) == .done)

  if image.canPunchHoles {
    #expect(perform(&engine, 0, StorageRequest(.discard, offset: 8192, byteCount: 4096)) == .done)
    check(file.content[8192..<12288].allSatisfy { $0 == 0 }, "discarded")
  }
  #expect(perform(&engine, 0, StorageRequest(.zero, offset: 512, byteCount: 1536)) == .done)
  #expect(perform(&engine, 0, StorageRequest(.zeroAndUnmap, offset: 65536, byteCount: 8192, isDurable: true)) == .done)
  check(file.content[512..<2048].allSatisfy { $0 == 0 } && file.content[65536..<73728].allSatisfy { $0 == 0 }, "zeroed")
  check(file.content[2048] == pattern(1 << 20, 9)[2048], "no more than asked for")

  // The image is cut off under us.
  truncate(file.path, 1 << 20)
  let lost = Memory(8192, pieces: [8192])
  let request = StorageRequest(.read, offset: (1 << 20) - 4096, byteCount: 8192, vectors: lost.vectors, vectorCount: 1)
  #expect(perform(&engine, 0, request) == .failed(.inputOutput))

  // A sync that failed once is not forgotten.
  image.noteFailedSync(.inputOutput)
  #expect(perform(&engine, 0, StorageRequest(.flush)) == .failed(.inputOutput))
}

@Suite struct EngineTests {
  @Test(arguments: [false, true], [false, true])
  func theRingKeepsItsPromises(isDirect: Bool, isRegistered: Bool) throws {
    let file = ImageFile(byteCount: 4 << 20)
    let image: DiskImage
    var options = DiskImage.Options(isDirect: isDirect)
    options.isRegistered = isRegistered
    do { image = try file.open(options) } catch DiskImageError.noDirectAccess { return }
    var engine: RingEngine
    do { engine = try RingEngine(image, depth: 8) } catch { return }
    try keepsItsPromises(file, image, &engine)
  }

  @Test(arguments: [false, true])
  func ordinaryCallsKeepTheSamePromises(isDirect: Bool) throws {
    let file = ImageFile(byteCount: 4 << 20)
    let image: DiskImage
    do { image = try file.open(.init(isDirect: isDirect)) } catch DiskImageError.noDirectAccess { return }
    var engine = try ThreadEngine(image, depth: 8)
    try keepsItsPromises(file, image, &engine)
  }

  @Test func aWatchedEventfdIsReportedBesideStorage() throws {
    let file = ImageFile(byteCount: 1 << 20)
    let image = try file.open()
    let event = try EventFD()
    var ring: RingEngine
    do { ring = try RingEngine(image, depth: 4) } catch { return }
    event.signal()
    ring.watch(event.fd.rawValue, token: 3)
    ring.turn(waiting: true)
    #expect(ring.nextEvent() == .readable(token: 3))
    for _ in 0..<3 {
      event.signal()
      ring.turn(waiting: true)
      #expect(ring.nextEvent() == .readable(token: 3))
    }
    ring.unwatch(event.fd.rawValue, token: 3)
    event.signal()
    ring.turn(waiting: false)
    #expect(ring.nextEvent() == nil)
    var plain = try ThreadEngine(image, depth: 4)
    plain.watch(event.fd.rawValue, token: 4)
    event.signal()
    plain.turn(waiting: true)
    #expect(plain.nextEvent() == .readable(token: 4))
    #expect(plain.nextEvent() == nil)
  }
}

@Suite struct SyncGateTests {
  @Test("One sync runs at a time, and the next is for all who came meanwhile")
  func groups() throws {
    let gate = SyncGate()
    let (a, b) = (try SyncPort(depth: 8), try SyncPort(depth: 8))
    func letters(_ port: SyncPort) -> [UInt16: SyncPort.Letter] {
      var all: [UInt16: SyncPort.Letter] = [:]
      while let (slot, letter) = port.next() { all[slot] = letter }
      return all
    }
    func isWoken(_ port: SyncPort) -> Bool { port.event.drain() > 0 }
    #expect(gate.enter(a, 1))
    #expect(!gate.enter(b, 2) && !gate.enter(a, 3) && !gate.enter(b, 4))
    #expect(letters(a).isEmpty && letters(b).isEmpty)
    // Nobody is answered by a sync that had begun before. Of those who wait the caller's own begins.
    gate.leave(-5, from: a)
    #expect(letters(a) == [3: .begin] && letters(b).isEmpty && !isWoken(a) && !isWoken(b))
    #expect(!gate.enter(a, 5))
    gate.leave(0, from: a)
    #expect(letters(b) == [2: .ended(0), 4: .ended(0)] && isWoken(b))
    #expect(letters(a) == [5: .begin])
    #expect(!gate.enter(b, 6))
    gate.leave(-5, from: a)
    #expect(letters(a).isEmpty && letters(b) == [6: .begin] && isWoken(b))
    gate.leave(0, from: b)
    #expect(gate.enter(a, 7), "nobody waits, so the next begins at once")
    gate.leave(0, from: nil)
    #expect(gate.enter(b, 8))
  }
}

@Suite struct OpeningTests {
  private func failure(_ body: () throws -> DiskImage) -> String {
    do {
      _ = try body()
      return "opened"
    } catch { return "\(error)" }
  }

  @Test("An image that is more than a disk's bytes is refused by its format, unless it is meant as it is or somebody serves it already")
  func otherFormats() throws {
    func text(_ string: String, at offset: Int = 0) -> [UInt8] { [UInt8](repeating: 0, count: offset) + string.utf8 }
    let heads: [(ImageFormat?, [UInt8])] = [
      (.qcow, [0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 1]), (.qcow2, [0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 2]),
      (.qcow2, [0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 3]), (nil, [0x51, 0x46, 0x49, 0xFB, 0, 0, 0, 4]), (.qed, text("QED\0")),
      (.vmdk, text("KDMV")), (.vmdk, text("COWD")), (.vmdk, text("# Disk DescriptorFile\nversion=1")),
      (.vdi, text("<<< Oracle VM VirtualBox Disk Image >>>") + [UInt8](repeating: 0, count: 25) + [0x7F, 0x10, 0xDA, 0xBE]),
      (.vhd, text("conectix")), (.vhdx, text("vhdxfile")), (.parallels, text("WithoutFreeSpace")),
      (.parallels, text("WithouFreSpacExt")), (nil, text("QFI")), (nil, text("conectix", at: 1)), (nil, []),
      // What guests make of their disks: LUKS, LVM, an archive.
      (nil, text("LUKS") + [0xBA, 0xBE, 0, 2]), (nil, text("LABELONE", at: 512)), (nil, [0x1F, 0x8B, 8]),
    ]
    for (format, head) in heads {
      let image = ImageFile(byteCount: 1 << 20)
      try image.begin(with: head)
      guard let format else {
        #expect(failure { try image.open() } == "opened", "\(head)")
        continue
      }
      let said = failure { try image.open() }
      #expect(said.contains("in the format \(format.rawValue), ") && said.contains("--blk-format=raw"), "\(said)")
      var raw = DiskImage.Options()
      raw.isRaw = true
      #expect(failure { try DiskImage.open(image.path, raw) } == "opened")
      // Behind the first opener's lock a guest may have written that.
      var locked = DiskImage.Options()
      locked.isLocked = true
      #expect(failure { try DiskImage.open(image.path, locked) } == "opened")
    }
    #expect(Set(heads.compactMap(\.0)) == Set(ImageFormat.allCases))
  }

  @Test func whatIsNoDiskIsRefusedByName() throws {
    #expect(failure { try DiskImage.open("/no/such/image", .init()) }.contains("/no/such/image: no such file"))
    #expect(failure { try DiskImage.open("/tmp", .init()) }.contains("/tmp"))
    #expect(failure { try DiskImage.open("/dev/null", .init()) }.contains("neither a regular file nor a block device"))
    let empty = ImageFile(byteCount: 0)
    #expect(failure { try empty.open() }.contains("0 bytes"))
    let small = ImageFile(byteCount: 511)
    #expect(failure { try small.open() }.contains("511 bytes"))
    // A pipe must not hold us.
    let pipe = "/tmp/martlet-pipe-" + UUID().uuidString
    mkfifo(pipe, 0o600)
    defer { unlink(pipe) }
    #expect(failure { try DiskImage.open(pipe, .init()) } != "opened")
    #expect(failure { try DiskImage.open(pipe, .init(isReadOnly: true)) }.contains("neither"))
  }

  @Test func anOddTailIsNotVisible() throws {
    let file = ImageFile(byteCount: 1000)
    #expect(try file.open().byteCount == 512)
  }

  @Test func oneWriterOrManyReaders() throws {
    let file = ImageFile(byteCount: 4096)
    do {
      let writer = try file.open()
      #expect(writer.byteCount == 4096)
      #expect(failure { try file.open() }.contains("in use"))
      #expect(failure { try file.open(.init(isReadOnly: true)) }.contains("in use"))
    }
    let reader = try file.open(.init(isReadOnly: true))
    let other = try file.open(.init(isReadOnly: true))
    #expect(failure { try file.open() }.contains("in use"))
    #expect(reader.isReadOnly && other.isReadOnly)
  }

  @Test func aDescriptorMustAllowWhatIsAskedFor() throws {
    let file = ImageFile(byteCount: 4096)
    #expect(failure { try DiskImage(.open(file.path, O_RDONLY), name: "x", .init()) }.contains("not open for reading and writing"))
    #expect(failure { try DiskImage(.open(file.path, O_WRONLY), name: "x", .init(isReadOnly: true)) }.contains("not open for reading"))
    #expect(try DiskImage(.open(file.path, O_RDWR), name: "x", .init(isReadOnly: true)).isReadOnly)
  }

  @Test func probingChangesNothing() throws {
    let file = ImageFile(byteCount: 8192)
    let before = try OwnedFD.open(file.path, O_RDONLY).status().byteCount
    _ = try file.open()
    #expect(try OwnedFD.open(file.path, O_RDONLY).status().byteCount == before)
    check(file.content.allSatisfy { $0 == 0 })
  }
}
