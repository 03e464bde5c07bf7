// Paths in directories that somebody else may write.

import Foundation
import Glibc
import HostSystem
import Synchronization
import TestSupport
import Testing

@Suite("Paths that are not what they seem", .enabled(if: MicroVM.canRun, MicroVM.cannotRun))
struct PathTests {
  @Test(arguments: ["file", "directory", "nothing"])
  func linksInPlaceOfWhatWeMakeAreNotFollowed(_ target: String) throws {
    let vm = try MicroVM()
    let victim = vm.path("victim")
    switch target {
    case "file": try "precious".write(toFile: victim, atomically: false, encoding: .utf8)
    case "directory": try FileManager.default.createDirectory(atPath: victim, withIntermediateDirectories: false)
    default: break
    }
    for socket in ["ctl", "con"] { try FileManager.default.createSymbolicLink(atPath: vm.path(socket), withDestinationPath: victim) }
    for options in [["--control", "ctl"], ["--console", "socket=con", "--control", "other"]] {
      let result = try vm.start("test=boot", options).wait()
      #expect(result.code == 3 && result.errorLines.count == 1, "\(result.errors)")
    }
    switch target {
    case "file": #expect(try String(contentsOfFile: victim, encoding: .utf8) == "precious")
    case "directory": #expect(try FileManager.default.contentsOfDirectory(atPath: victim).isEmpty)
    default: #expect(access(victim, F_OK) != 0)
    }
    for socket in ["ctl", "con"] { #expect(try FileManager.default.destinationOfSymbolicLink(atPath: vm.path(socket)) == victim) }
  }

  @Test func aFileInPlaceOfASocketStays() throws {
    let vm = try MicroVM()
    try "precious".write(toFile: vm.path("ctl"), atomically: false, encoding: .utf8)
    let result = try vm.start("test=boot").wait()
    #expect(result.code == 3 && result.errorLines.count == 1, "\(result.errors)")
    #expect(try String(contentsOfFile: vm.path("ctl"), encoding: .utf8) == "precious")
  }

  @Test func whatSomebodyElsePutAtOurPlaceStays() throws {
    let vm = try MicroVM()
    let program = try vm.start("test=idle ms=60000", ["--console", "socket=con"])
    let end = Date().addingTimeInterval(60)
    while Date() < end, try !vm.ctl("info").output.contains("\"state\":\"running\"") { usleep(5000) }
    try FileManager.default.removeItem(atPath: vm.path("con"))
    try "theirs".write(toFile: vm.path("con"), atomically: false, encoding: .utf8)
    program.signal(SIGTERM)
    #expect(program.wait().code == 143)
    #expect(try String(contentsOfFile: vm.path("con"), encoding: .utf8) == "theirs")
    #expect(access(vm.path("ctl"), F_OK) != 0)
  }

  /// 24 starts, a thousand with MARTLET_FULL, while somebody swaps what their paths lead to: image and kernel for links to what is not
  /// theirs, the places of the sockets for links and files. Whatever a start finds, it runs or says why not, and what the links lead to stays
  /// as it is.
  @Test func pathsThatAreSwappedWhileManyStart() throws {
    let (vm, others) = (try MicroVM(), try MicroVM())
    let (image, text) = (others.path("image"), others.path("text"))
    let bytes = Data((0..<1 << 20).map { _ in UInt8.random(in: 0...255) })
    try bytes.write(to: URL(fileURLWithPath: image))
    try "precious".write(toFile: text, atomically: false, encoding: .utf8)
    let before = try status(of: [image, text, others.directory])
    let options = try vm.disk(mebibytes: 1) + ["--console", "socket=con"]
    rename(vm.path("disk.img"), vm.path("disk.real"))
    try FileManager.default.copyItem(atPath: MicroGuest.path(of: .elf), toPath: vm.path("kernel.real"))
    var words = try vm.command("test=boot", options)
    words[3] = "kernel"
    let swapper = try Swapper(vm.directory, image: image, text: text)
    defer { swapper.end() }
    var ran = 0
    var refused: [String: Int] = [:]
    let count = MicroGuest.isFull ? 1000 : 24
    for turn in 0..<1000 where turn < count || ran < 3 || refused.count < 3 {
      let result = try RunningProgram(words[0], Array(words.dropFirst()), directory: vm.directory).wait(seconds: 60)
      if result.code == 0 {
        ran += 1
        #expect(result.output.contains("MICRO done ok"), "\(result.output)")
      } else {
        #expect(
          result.signal == nil && [3, 5].contains(result.code) && (1...2).contains(result.errorLines.count),
          "\(result.code): \(result.errors)")
        refused[result.errorLines.first ?? "", default: 0] += 1
      }
    }
    swapper.end()
    #expect(ran > 2 && refused.count > 2, "\(ran) ran; \(refused)")
    #expect(try Data(contentsOf: URL(fileURLWithPath: image)) == bytes)
    #expect(try String(contentsOfFile: text, encoding: .utf8) == "precious")
    #expect(try status(of: [image, text, others.directory]) == before)
    for line in MicroGuest.commandLines().values { #expect(!line.contains(vm.name), "\(line)") }
  }

  /// Inode, mode, owner and size, and of a directory when an entry came or went. Hard links come and go, and whoever asks a file system
  /// whether an image can have holes gives the image a new time.
  private func status(of paths: [String]) throws -> [[UInt64]] {
    try paths.map { path in
      var found = stat()
      guard stat(path, &found) == 0 else { throw TestFailure("\(path) is gone") }
      let time = found.st_mode & S_IFMT == S_IFDIR ? UInt64(found.st_mtim.tv_sec) * 1_000_000_000 + UInt64(found.st_mtim.tv_nsec) : 0
      return [UInt64(found.st_ino), UInt64(found.st_mode), UInt64(found.st_uid), UInt64(found.st_size), time]
    }
  }
}

/// Puts other things in the places of a VM's files, each in one step, until it is told to end.
private final class Swapper: Sendable {
  private let goesOn = Atomic(true)
  private let thread: Mutex<HostThread?>

  init(_ directory: String, image: String, text: String) throws {
    thread = Mutex(nil)
    let (real, kernel) = ("disk.real", "kernel.real")
    @Sendable func put(_ name: String, _ make: (String) -> CInt) {
      let made = directory + "/made"
      unlink(made)
      if make(made) == 0 { rename(made, directory + "/" + name) }
    }
    put("disk.img") { symlink(real, $0) }
    put("kernel") { symlink(kernel, $0) }
    let started = try HostThread.start(name: "swapper") { [self] in
      while goesOn.load(ordering: .relaxed) {
        switch Int.random(in: 0..<8) {
        case 0: put("disk.img") { symlink([image, text, "nowhere"].randomElement() ?? real, $0) }
        case 1: put("kernel") { symlink([text, "nowhere"].randomElement() ?? kernel, $0) }
        case 2: put(["ctl", "con"].randomElement() ?? "ctl") { Bool.random() ? symlink(text, $0) : link(text, $0) }
        case 3: put("disk.img") { link(directory + "/" + real, $0) }
        case 4: put("kernel") { link(directory + "/" + kernel, $0) }
        default:
          // Mostly things are as they should be, or no start would come far.
          for name in ["ctl", "con"] { unlink(directory + "/" + name) }
          put("disk.img") { symlink(real, $0) }
          put("kernel") { symlink(kernel, $0) }
        }
        usleep(.random(in: 0..<12_000))
      }
    }
    thread.withLock { $0 = started }
  }

  func end() {
    goesOn.store(false, ordering: .relaxed)
    thread.withLock { $0.take() }?.join()
  }
}
