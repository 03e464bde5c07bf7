import CLinux
import DiskImage
import Foundation
import HostSystem
import TestSupport
import Testing

/// What an engine reads without the kernel.
@Suite struct CachedReaderTests {
  /// An image of `byteCount` bytes of noise, an engine on it, and memory for one request.
  private final class Rig {
    let path = "/tmp/martlet-cached-" + UUID().uuidString
    let image: DiskImage
    let content: [UInt8]
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 65536, alignment: 4096)
    let vector = UnsafeMutablePointer<iovec>.allocate(capacity: 1)

    init(byteCount: Int, _ options: DiskImage.Options = .init()) throws {
      var random = SeededRandom(5)
      content = (0..<byteCount).map { _ in UInt8.random(in: 1...255, using: &random) }
      guard FileManager.default.createFile(atPath: path, contents: Data(content)) else { throw TestFailure("no image") }
      image = try DiskImage.open(path, options)
      vector.initialize(to: iovec())
    }

    deinit {
      unlink(path)
      memory.deallocate()
      vector.deallocate()
    }

    func request(_ operation: StorageOperation, _ offset: Int, _ count: Int) -> StorageRequest {
      vector.pointee = iovec(iov_base: memory, iov_len: count)
      return StorageRequest(operation, offset: UInt64(offset), byteCount: UInt64(count), vectors: vector, vectorCount: 1)
    }

    func bytes(_ count: Int) -> [UInt8] { Array(UnsafeRawBufferPointer(start: memory, count: count)) }

    func perform<Engine: StorageEngine & ~Copyable>(_ engine: inout Engine, _ request: StorageRequest) -> StorageOutcome {
      if let outcome = engine.begin(0, request) { return outcome }
      for _ in 0..<1000 {
        engine.turn(waiting: true)
        while let event = engine.nextEvent() { if case .completed(_, let outcome) = event { return outcome } }
      }
      return .failed(.timedOut)
    }

    /// Whether the bytes can be had by copying, and are the file's.
    func copies<Engine: StorageEngine & ~Copyable>(_ engine: inout Engine, _ offset: Int, _ count: Int) -> Bool {
      memset(memory, 0, count)
      switch engine.copy(request(.read, offset, count)) {
      case .no: return false
      case .whole: return true
      case .ifLongEnough: return engine.wholeByteCount >= UInt64(offset + count)
      }
    }
  }

  /// Whether images in /tmp are mapped at all (linux/magic.h).
  static let canMap: Bool = {
    guard let place = try? OwnedFD.open("/tmp", O_RDONLY) else { return false }
    return [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010].contains(clinux_file_system(place.rawValue))
  }()

  private func isUsed(_ rig: Rig) throws -> ThreadEngine? {
    var engine = try ThreadEngine(rig.image, depth: 1, threadCount: 1)
    // The first request of a window maps it, the second is remembered.
    for _ in 0..<2 { #expect(rig.perform(&engine, rig.request(.read, 0, 4096)) == .done) }
    guard rig.copies(&engine, 0, 4096) else { return nil }
    return consume engine
  }

  @Test(.enabled(if: canMap, "/tmp lies on a file system whose mappings are not used."))
  func whatWasReadOnceIsCopiedFromThenOn() throws {
    let rig = try Rig(byteCount: 1 << 20)
    guard var engine = try isUsed(rig) else {
      Issue.record("The image is not mapped")
      return
    }
    check(rig.bytes(4096) == Array(rig.content[..<4096]))
    #expect(!rig.copies(&engine, 8192, 4096), "not read before")
    #expect(rig.perform(&engine, rig.request(.read, 8192, 8192)) == .done)
    #expect(rig.copies(&engine, 8192 + 512, 4096), "a part of two pages")
    check(rig.bytes(4096) == Array(rig.content[8704..<12800]))
    #expect(!rig.copies(&engine, 12288, 65536), "reaches further than what is known")

    memset(rig.memory, 0xAB, 4096)
    #expect(rig.perform(&engine, rig.request(.write, 8192, 4096)) == .done)
    #expect(rig.copies(&engine, 8192, 4096))
    check(rig.bytes(4096).allSatisfy { $0 == 0xAB }, "a write is seen at once")
    if rig.image.canPunchHoles {
      #expect(rig.perform(&engine, StorageRequest(.discard, offset: 8192, byteCount: 4096)) == .done)
      #expect(rig.copies(&engine, 8192, 4096))
      check(rig.bytes(4096).allSatisfy { $0 == 0 }, "a hole is seen at once")
    }
  }

  @Test(.enabled(if: canMap, "/tmp lies on a file system whose mappings are not used."))
  func aFileThatIsCutOffGivesErrorsAndNeverASignalOrZeros() throws {
    let rig = try Rig(byteCount: 1 << 20)
    guard var engine = try isUsed(rig) else { throw TestFailure("the image is not mapped") }
    #expect(rig.perform(&engine, rig.request(.read, 65536, 8192)) == .done)
    #expect(rig.copies(&engine, 65536, 8192))
    // In the middle of a page: the rest of it reads as zeros from the mapping.
    truncate(rig.path, 65536 + 1000)
    #expect(!rig.copies(&engine, 65536, 4096))
    #expect(rig.perform(&engine, rig.request(.read, 65536, 4096)) == .failed(.inputOutput))
    // Before the end there is nothing to ask for, behind it there is, also where the copy ends within the page that has the end.
    #expect(engine.copy(rig.request(.read, 65536, 512)) == .whole)
    check(rig.bytes(512) == Array(rig.content[65536..<(65536 + 512)]))
    #expect(engine.copy(rig.request(.read, 65536, 1024)) == .ifLongEnough)
    #expect(!rig.copies(&engine, 65536 + 512, 512))
    // Whole pages are gone: SIGBUS.
    truncate(rig.path, 4096)
    #expect(!rig.copies(&engine, 65536, 4096))
    #expect(!rig.copies(&engine, 65536 + 4096, 4096))
    #expect(rig.perform(&engine, rig.request(.read, 65536, 4096)) == .failed(.inputOutput))
    // The neighbourhood was forgotten with it, and is learnt anew.
    #expect(rig.perform(&engine, rig.request(.read, 0, 4096)) == .done)
    #expect(rig.copies(&engine, 0, 4096), "what is still there is still served")
  }

  @Test func onlyPlainLocalImagesAreMapped() throws {
    for options in [DiskImage.Options(isReadOnly: true, isShared: true), .init(mapsCache: false), .init(isDirect: true)] {
      let rig: Rig
      do { rig = try Rig(byteCount: 65536, options) } catch DiskImageError.noDirectAccess { continue }
      let isMapped: Bool
      switch try isUsed(rig) {
      case .some: isMapped = true
      case .none: isMapped = false
      }
      #expect(!isMapped)
    }
  }

  @Test func aDiskWithoutStorageAnswersAtOnce() throws {
    let image = try DiskImage(nullOf: 1 << 20)
    var engine = try ThreadEngine(image, depth: 1, threadCount: 1)
    #expect(engine.begin(0, StorageRequest(.flush)) == .done)
    #expect(image.byteCount == 1 << 20 && !image.isReadOnly)
  }

  @Test func aChangedSizeIsSeenWhenLookedAt() throws {
    let rig = try Rig(byteCount: 65536)
    #expect(try !rig.image.lookAgain())
    truncate(rig.path, 131072 + 100)
    #expect(rig.image.byteCount == 65536)
    #expect(try rig.image.lookAgain())
    #expect(rig.image.byteCount == 131072)
    truncate(rig.path, 100)
    #expect(throws: DiskImageError.self) { try rig.image.lookAgain() }
    #expect(rig.image.byteCount == 131072)
  }
}
