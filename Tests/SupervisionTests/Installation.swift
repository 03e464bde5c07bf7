import Foundation
import Glibc
import TestSupport
import Testing

/// Martlet installed into a directory of its own, with the fake program as core and devices, and files for a VM.
final class Installation: @unchecked Sendable {
  // Immutable after `init`.
  let directory: String

  static let canRun = access("/dev/kvm", R_OK | W_OK) == 0 && BuiltPrograms.exists("martlet-fake")

  init(programs: [String] = ["martlet-core", "martlet-block", "martlet-net", "martlet-console", "martlet-template"]) throws {
    directory = "/tmp/martlet-test-\(getpid())-\(UInt32.random(in: 0 ... .max))"
    let files = FileManager.default
    try files.createDirectory(atPath: directory, withIntermediateDirectories: true)
    chmod(directory, 0o755)
    // Copied by another process: a program that this one has open for writing while some other test forks cannot be executed
    // until that child has executed too (ETXTBSY).
    let copies = ["martlet", "martlet-supervisor"].map { BuiltPrograms.path($0) }
    try #require(RunningProgram("/bin/cp", copies + [directory]).wait().code == 0)
    for name in programs {
      // Hard links where the file system allows it: the fake is large.
      if link(directory + "/.fake", directory + "/" + name) != 0 {
        try #require(RunningProgram("/bin/cp", [BuiltPrograms.path("martlet-fake"), directory + "/.fake"]).wait().code == 0)
        try #require(link(directory + "/.fake", directory + "/" + name) == 0)
      }
    }
    try Data(repeating: 7, count: 4096).write(to: URL(fileURLWithPath: directory + "/kernel"))
    try Data(count: 1 << 20).write(to: URL(fileURLWithPath: directory + "/disk.img"))
  }

  deinit { try? FileManager.default.removeItem(atPath: directory) }

  /// `martlet run`, in the installation's directory, with a null console unless the arguments name one.
  func start(_ arguments: [String], input: FileHandle? = nil) throws -> RunningProgram {
    let console = arguments.contains("--console") ? [] : ["--console", "null"]
    let kernel = arguments.contains("--kernel") ? [] : ["--kernel", "kernel"]
    return try RunningProgram(
      directory + "/martlet", ["run"] + kernel + console + arguments, directory: directory, input: input)
  }

  func run(_ arguments: String..., seconds: Double = 20) throws -> ProgramResult {
    try start(arguments).wait(seconds: seconds)
  }

  /// A command of the host under /bin/sh, in this directory.
  func shell(_ script: String, seconds: Double = 20) throws -> ProgramResult {
    try RunningProgram("/bin/sh", ["-c", script], directory: directory).wait(seconds: seconds)
  }

  func ctl(_ arguments: String...) throws -> ProgramResult {
    try RunningProgram(directory + "/martlet", ["ctl", "--control", "ctl"] + arguments, directory: directory).wait()
  }

  /// Processes whose program lies in this directory, as pid and title.
  var processes: [(pid: Int32, title: String)] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: "/proc")) ?? []
    return names.compactMap { name in
      guard let pid = Int32(name), let exe = try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/\(name)/exe"),
        exe.hasPrefix(directory + "/")
      else { return nil }
      let line = FileManager.default.contents(atPath: "/proc/\(name)/cmdline") ?? Data()
      return (pid, String(decoding: line.prefix { $0 != 0 }, as: UTF8.self))
    }
  }

  func waitUntil(_ what: String = "", seconds: Double = 10, _ condition: () throws -> Bool) rethrows {
    let end = Date().addingTimeInterval(seconds)
    while Date() < end {
      if try condition() { return }
      usleep(5000)
    }
    Issue.record("In vain waited for: \(what)")
  }

  /// Waits until the VM with control socket `ctl` runs.
  func waitUntilRunning() throws {
    try waitUntil("a running VM") { try ctl("info", "--json").output.contains("\"state\":\"running\"") }
    // The carrier of the serial port comes up beside the guest.
    waitUntil("titles of all processes") { processes.allSatisfy { $0.title.hasPrefix("vm/") } }
  }

  /// What must be true after every end: no process, no socket file. Processes may take a moment to be reaped by init.
  func expectNothingLeft(_ location: SourceLocation = #_sourceLocation) {
    let end = Date().addingTimeInterval(60)
    while !processes.isEmpty, Date() < end { usleep(5000) }
    let left = processes.map { "\($0.pid) \($0.title)" }
    #expect(left.isEmpty, sourceLocation: location)
    for process in processes { kill(process.pid, SIGKILL) }
    let files = (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? []
    for file in files {
      var status = stat()
      let isSocket = lstat(directory + "/" + file, &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK
      #expect(!isSocket, "\(file) is left", sourceLocation: location)
    }
  }

  func status(_ pid: Int32, _ field: String) -> String? {
    let text = FileManager.default.contents(atPath: "/proc/\(pid)/status").map { String(decoding: $0, as: UTF8.self) } ?? ""
    return text.split(separator: "\n").first { $0.hasPrefix(field + ":") }
      .map { $0.dropFirst(field.count + 1).split(whereSeparator: \.isWhitespace).joined(separator: " ") }
  }
}
