// A back-end program under test, as its own process.

import Foundation
import HostSystem

public struct TestFailure: Error, CustomStringConvertible {
  public let description: String
  public init(_ description: String) { self.description = description }
}

/// A program of this build, started with a listening socket of its own in a directory of its own. It and what it starts are
/// one process group, which ends with this object.
public final class DeviceProcess {
  public let directory: URL
  public var socketPath: String { directory.appendingPathComponent("s").path }
  public let processID: pid_t
  private let errors: URL
  private var end: Int32?

  /// The directory of the programs built with these tests.
  public static var programs: URL {
    URL(fileURLWithPath: (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/exe")) ?? CommandLine.arguments[0])
      .deletingLastPathComponent()
  }

  /// - Parameter wrapper: a command that runs the program, for example `strace`; its first word is a path.
  public init(_ program: String, _ arguments: [String], wrapper: [String] = [], listens: Bool = true) throws {
    directory = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-test-" + UUID().uuidString)
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
    errors = directory.appendingPathComponent("stderr")
    let path = Self.programs.appendingPathComponent(program).path
    guard FileManager.default.isExecutableFile(atPath: path) else { throw TestFailure("\(path) was not built") }
    let words = wrapper + [path] + (listens ? ["--socket-path=" + directory.appendingPathComponent("s").path] : []) + arguments
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0)
    posix_spawn_file_actions_addopen(&actions, 2, errors.path, O_WRONLY | O_CREAT | O_APPEND, 0o600)
    var attributes = posix_spawnattr_t()
    posix_spawnattr_init(&attributes)
    defer { posix_spawnattr_destroy(&attributes) }
    posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETPGROUP))
    posix_spawnattr_setpgroup(&attributes, 0)
    var line: [UnsafeMutablePointer<CChar>?] = words.map { strdup($0) } + [nil]
    defer { for word in line { free(word) } }
    var child: pid_t = 0
    let result = posix_spawn(&child, words[0], &actions, &attributes, &line, environ)
    guard result == 0 else { throw TestFailure("\(words[0]) cannot be started: \(Errno(result))") }
    processID = child
  }

  deinit {
    signal(SIGKILL)
    _ = wait(blocking: true)
    try? FileManager.default.removeItem(at: directory)
  }

  /// What the program has said, but for what each says that is started so.
  public var log: String {
    let lines = everyLine.split(separator: "\n", omittingEmptySubsequences: false).filter { !$0.contains("This process is not confined") }
    return lines.joined(separator: "\n")
  }
  public var everyLine: String { (try? String(contentsOf: errors, encoding: .utf8)) ?? "" }

  /// Sends a signal to the program and to what runs it.
  public func signal(_ number: Int32) { if end == nil { kill(-processID, number) } }

  public var isRunning: Bool { wait(blocking: false) == nil }

  private func wait(blocking: Bool) -> Int32? {
    if let end { return end }
    var status: Int32 = 0
    guard waitpid(processID, &status, blocking ? 0 : WNOHANG) == processID else { return nil }
    end = status
    return status
  }

  /// Kills and collects it.
  public func kill9() {
    signal(SIGKILL)
    _ = wait(blocking: true)
  }

  /// Connects as soon as the program listens.
  public func connect(within limit: Duration = .seconds(10)) throws -> OwnedFD {
    let end = MonotonicTime.now.advanced(by: limit)
    while true {
      do { return try UnixSocket.connect(to: socketPath) } catch {
        guard MonotonicTime.now < end, isRunning else { throw TestFailure("no connection: \(error); the program said: \(log)") }
        usleep(2000)
      }
    }
  }

  /// Waits for the end; the exit code, or nil when a signal ended it or the time passed.
  public func exitCode(within limit: Duration = .seconds(10)) -> Int32? {
    let deadline = MonotonicTime.now.advanced(by: limit)
    while isRunning {
      guard MonotonicTime.now < deadline else { return nil }
      usleep(2000)
    }
    guard let end, end & 0x7F == 0 else { return nil }
    return end >> 8 & 0xFF
  }
}
