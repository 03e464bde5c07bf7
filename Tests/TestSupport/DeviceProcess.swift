// A back-end program under test, as its own process.

import Foundation
import HostSystem

public struct TestFailure: Error, CustomStringConvertible {
  public let description: String
  public init(_ description: String) { self.description = description }
}

/// A program of this build, started with a listening socket of its own in a directory of its own.
public final class DeviceProcess {
  public let directory: URL
  public var socketPath: String { directory.appendingPathComponent("s").path }
  public let process = Process()
  private let errors: URL

  /// The directory of the programs built with these tests.
  public static var programs: URL {
    URL(fileURLWithPath: (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/exe")) ?? CommandLine.arguments[0])
      .deletingLastPathComponent()
  }

  /// - Parameter wrapper: a command that runs the program, for example `strace`.
  public init(_ program: String, _ arguments: [String], wrapper: [String] = [], listens: Bool = true) throws {
    directory = FileManager.default.temporaryDirectory.appendingPathComponent("martlet-test-" + UUID().uuidString)
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
    errors = directory.appendingPathComponent("stderr")
    _ = FileManager.default.createFile(atPath: errors.path, contents: nil)
    let path = Self.programs.appendingPathComponent(program).path
    guard FileManager.default.isExecutableFile(atPath: path) else { throw TestFailure("\(path) was not built") }
    let line = wrapper + [path] + (listens ? ["--socket-path=" + socketPath] : []) + arguments
    process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    process.arguments = line
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = FileHandle.nullDevice
    process.standardError = try FileHandle(forWritingTo: errors)
    try process.run()
  }

  deinit {
    if process.isRunning {
      kill(process.processIdentifier, SIGKILL)
      process.waitUntilExit()
    }
    try? FileManager.default.removeItem(at: directory)
  }

  public var log: String { (try? String(contentsOf: errors, encoding: .utf8)) ?? "" }

  /// Connects as soon as the program listens.
  public func connect(within limit: Duration = .seconds(10)) throws -> OwnedFD {
    let end = MonotonicTime.now.advanced(by: limit)
    while true {
      do { return try UnixSocket.connect(to: socketPath) } catch {
        guard MonotonicTime.now < end, process.isRunning else { throw TestFailure("no connection: \(error); the program said: \(log)") }
        usleep(2000)
      }
    }
  }

  /// Waits for the end; the exit code, or nil when a signal ended it or the time passed.
  public func exitCode(within limit: Duration = .seconds(10)) -> Int32? {
    let end = MonotonicTime.now.advanced(by: limit)
    while process.isRunning {
      guard MonotonicTime.now < end else { return nil }
      usleep(2000)
    }
    return process.terminationReason == .exit ? process.terminationStatus : nil
  }
}
