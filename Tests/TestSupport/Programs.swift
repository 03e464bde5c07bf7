import Foundation
import Glibc

/// The programs of this build, for tests that run them for real.
public enum BuiltPrograms {
  /// Where they are: `MARTLET_BUILD`, or beside the test bundle.
  public static let directory: String = {
    if let path = ProcessInfo.processInfo.environment["MARTLET_BUILD"] { return path }
    for argument in CommandLine.arguments {
      if let range = argument.range(of: "/[^/]*\\.xctest.*$", options: .regularExpression) {
        return String(argument[..<range.lowerBound])
      }
    }
    return ".build/release"
  }()

  public static func path(_ name: String) -> String { directory + "/" + name }
  public static func exists(_ name: String) -> Bool { access(path(name), X_OK) == 0 }
}

/// What a finished program left.
public struct ProgramResult: Sendable {
  public let code: Int32
  public let signal: Int32?
  public let output: String
  public let errors: String

  /// The lines on standard error.
  public var errorLines: [String] { errors.split(separator: "\n").map(String.init) }
}

/// A program under test, with its standard output and error collected. It is killed when it outlives its time.
public final class RunningProgram: @unchecked Sendable {
  // The process object is used from one test only; the collectors synchronise by their own lock.
  private let process = Process()
  private let output = Collector()
  private let errors = Collector()

  public init(_ path: String, _ arguments: [String], directory: String? = nil, input: FileHandle? = nil) throws {
    process.executableURL = URL(fileURLWithPath: path)
    process.arguments = arguments
    if let directory { process.currentDirectoryURL = URL(fileURLWithPath: directory) }
    process.standardInput = input ?? FileHandle.nullDevice
    process.standardOutput = output.pipe
    process.standardError = errors.pipe
    try process.run()
    output.start()
    errors.start()
  }

  public var pid: Int32 { process.processIdentifier }
  public var isRunning: Bool { process.isRunning }
  public var errorText: String { errors.text }
  public var outputText: String { output.text }

  public func signal(_ number: Int32) { kill(pid, number) }

  /// Waits for the end, at most so many seconds; kills it then and reports signal 9.
  public func wait(seconds: Double = 20) -> ProgramResult {
    let end = Date().addingTimeInterval(seconds)
    while process.isRunning, Date() < end { usleep(5000) }
    if process.isRunning { kill(pid, SIGKILL) }
    process.waitUntilExit()
    // Descendants that hold the pipes open must not hold the test.
    output.finish()
    errors.finish()
    let signalled = process.terminationReason == .uncaughtSignal
    return ProgramResult(
      code: signalled ? -1 : process.terminationStatus, signal: signalled ? process.terminationStatus : nil,
      output: output.text, errors: errors.text)
  }
}

private final class Collector: @unchecked Sendable {
  // `data` and `isFinished` are touched under `lock` only.
  let pipe = Pipe()
  private var data = Data()
  private var isFinished = false
  private let lock = NSLock()

  /// Reads on a thread of its own, in order: handlers of Dispatch may overtake one another, and the end the last words.
  func start() {
    let descriptor = pipe.fileHandleForReading.fileDescriptor
    Thread.detachNewThread { [self] in
      var buffer = [UInt8](repeating: 0, count: 65536)
      while true {
        let count = read(descriptor, &buffer, buffer.count)
        if count < 0 && errno == EINTR { continue }
        lock.withLock { if count > 0 { data.append(contentsOf: buffer[..<count]) } else { isFinished = true } }
        if count <= 0 { break }
      }
    }
  }

  func finish() {
    let end = Date().addingTimeInterval(1)
    while !lock.withLock({ isFinished }), Date() < end { usleep(2000) }
  }

  var text: String { lock.withLock { String(decoding: data, as: UTF8.self) } }
}
