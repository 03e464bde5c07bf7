import Foundation
import Glibc
import HostSystem

/// Bytes that a seed makes.
public func pattern(_ count: Int, _ seed: UInt64) -> [UInt8] {
  var random = SeededRandom(seed)
  var bytes = [UInt8]()
  bytes.reserveCapacity(count + 8)
  while bytes.count < count { withUnsafeBytes(of: random.next()) { bytes += $0 } }
  return Array(bytes[..<count])
}

/// A block device of the host in front of a file; it goes away with this.
public final class LoopDisk {
  public static let canRun = geteuid() == 0 && access("/dev/loop-control", R_OK | W_OK) == 0 && access("/usr/sbin/losetup", X_OK) == 0

  public let backing: String
  private let ownsBacking: Bool
  public let device: String

  public init(byteCount: Int) throws {
    backing = "/tmp/martlet-loop-" + UUID().uuidString
    ownsBacking = true
    let content = Data(pattern(byteCount, 8))
    guard FileManager.default.createFile(atPath: backing, contents: content) else { throw TestFailure("no backing file") }
    device = try Self.losetup(["-f", "--show", backing])
  }

  public init(over backing: String, sectorSize: Int = 512) throws {
    self.backing = backing
    ownsBacking = false
    device = try Self.losetup(["-f", "--show", "-b", "\(sectorSize)", backing])
  }

  deinit {
    _ = try? Self.losetup(["-d", device])
    if ownsBacking { unlink(backing) }
  }

  private static func losetup(_ arguments: [String]) throws -> String {
    let process = Process()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: "/usr/sbin/losetup")
    process.arguments = arguments
    process.standardOutput = output
    try process.run()
    let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    guard process.terminationStatus == 0 else { throw TestFailure("losetup \(arguments) failed") }
    return text.trimmingCharacters(in: .whitespacesAndNewlines)
  }

  public var content: [UInt8] { (FileManager.default.contents(atPath: backing)).map { Array($0) } ?? [] }
  /// Bytes of storage that the file takes up.
  public var allocated: Int {
    var status = stat()
    stat(backing, &status)
    return Int(status.st_blocks) * 512
  }
}

/// A file system of its own; it goes away with this.
public final class TemporaryMount {
  public let place = "/tmp/martlet-mount-" + UUID().uuidString

  public init(_ source: String, _ type: String, _ options: String = "") throws {
    try FileManager.default.createDirectory(atPath: place, withIntermediateDirectories: true)
    guard mount(source, place, type, 0, options) == 0 else {
      let error = Errno.current
      rmdir(place)
      throw TestFailure("cannot mount \(source): \(error.explanation)")
    }
  }

  deinit {
    umount2(place, 2)
    rmdir(place)
  }
}

/// A block device of 8 MiB that has room for less than 2: what does not fit is lost when it is written out.
public final class FullStorage {
  public let loop: LoopDisk
  private let memory: TemporaryMount
  private let limit: String
  private let before: String

  public init() throws {
    memory = try TemporaryMount("tmpfs", "tmpfs", "size=2m")
    let backing = memory.place + "/disk"
    guard FileManager.default.createFile(atPath: backing, contents: nil) else { throw TestFailure("no backing file") }
    truncate(backing, 8 << 20)
    loop = try LoopDisk(over: backing)
    // A page at a time: of a longer write that fits in part Linux 6.18's loop device says that all of it was written.
    limit = "/sys/block/\(loop.device.dropFirst(5))/queue/max_sectors_kb"
    before = try String(contentsOfFile: limit, encoding: .utf8)
    try "4".write(toFile: limit, atomically: false, encoding: .utf8)
  }

  deinit { try? before.write(toFile: limit, atomically: false, encoding: .utf8) }
}

/// ext4 on a block device whose sectors have a size of their own.
public final class MountedDisk {
  public static let canRun = LoopDisk.canRun && access("/usr/sbin/mkfs.ext4", X_OK) == 0

  public var place: String { mounted.place }
  private let mounted: TemporaryMount
  private let loop: LoopDisk
  private let backing: String

  public init(sectorSize: Int) throws {
    backing = "/tmp/martlet-loop-" + UUID().uuidString
    guard FileManager.default.createFile(atPath: backing, contents: nil) else { throw TestFailure("no backing file") }
    truncate(backing, 64 << 20)
    loop = try LoopDisk(over: backing, sectorSize: sectorSize)
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/sbin/mkfs.ext4")
    process.arguments = ["-q", loop.device]
    try process.run()
    process.waitUntilExit()
    guard process.terminationStatus == 0 else { throw TestFailure("mkfs.ext4 failed") }
    mounted = try TemporaryMount(loop.device, "ext4")
  }

  deinit { unlink(backing) }
}
