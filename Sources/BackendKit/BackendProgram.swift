import CLinux
import Glibc
import HostSystem

/// A back-end program: what it is called, which options it has, and its life from arguments to exit code.
///
/// Exit codes: 0 the front end went away, SIGTERM, or nothing was asked but text; 1 it could not start or had to give up;
/// 2 the command line is wrong. Each failure is one line on standard error.
public struct BackendProgram: Sendable {
  /// The `type` of the capabilities JSON (`docs/interop/vhost-user.json` of QEMU): `block`, `net`, ...
  public let type: String
  /// The `features` of the capabilities JSON.
  public let features: [String]
  public let options: [LaunchOption]

  public init(type: String, features: [String] = [], options: [LaunchOption] = []) {
    self.type = type
    self.features = features
    self.options = options
  }

  /// Runs the program; returns its exit code.
  /// - Parameters:
  ///   - arguments: the whole command line, with the program's name first.
  ///   - makeDevice: opens what the device needs. Called before the sandbox closes.
  public func run<Device: DeviceBackend & ~Copyable>(
    _ arguments: [String], makeDevice: (LaunchArguments) throws(BackendError) -> Device
  ) -> CInt {
    Log.setSpeaker("martlet-" + type)
    let launch: LaunchArguments
    do {
      launch = try LaunchArguments.parse(Array(arguments.dropFirst()), options: options)
    } catch {
      Log.error("\(error)")
      return 2
    }
    switch launch.request {
    case .help:
      Log.write(helpLines.joined(separator: "\n"))
      return 0
    case .printCapabilities:
      Log.write(capabilities)
      return 0
    case .serve: break
    }
    Log.level = launch.logLevel
    if let title = launch.title { Log.setSpeaker(title) }
    Log.error("Serving is not there yet")
    return 1
  }

  /// The capabilities as one JSON object.
  public var capabilities: String {
    // Names are ours and need no escaping.
    let list = features.map { "\"\($0)\"" }.joined(separator: ", ")
    return "{\"type\": \"\(type)\"" + (features.isEmpty ? "}" : ", \"features\": [\(list)]}")
  }

  var helpLines: [String] {
    let all = LaunchArguments.common + options
    let names = all.map { "--" + $0.name + ($0.argument.map { "=" + $0 } ?? "") }
    let width = (names.map(\.utf8.count).max() ?? 0) + 2
    return ["martlet-\(type): a vhost-user \(type) device in its own process", ""]
      + zip(names, all).map { name, option in
        "  " + name + String(repeating: " ", count: width - name.utf8.count) + option.help
      }
  }
}

extension Log {
  /// Text on standard output, for the options that ask for it.
  static func write(_ text: String) {
    let output = OwnedFD(owning: 1)
    try? output.writeAll(Array((text + "\n").utf8))
    _ = output.release()
  }
}
