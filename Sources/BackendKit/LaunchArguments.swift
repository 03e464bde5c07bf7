import HostSystem
import Sandbox

/// One option of a device program besides those every back end has.
public struct LaunchOption: Sendable {
  public let name: String
  /// What stands after `=` in the help text; nil for a switch.
  public let argument: String?
  public let help: String

  /// `--name=ARGUMENT`
  public static func value(_ name: String, _ argument: String, _ help: String) -> LaunchOption {
    LaunchOption(name: name, argument: argument, help: help)
  }

  /// `--name`
  public static func flag(_ name: String, _ help: String) -> LaunchOption {
    LaunchOption(name: name, argument: nil, help: help)
  }
}

/// The command line of a back-end program (launch contract, and QEMU's conventions for vhost-user back-end programs).
/// Nothing is inherited silently: every descriptor is named here.
public struct LaunchArguments: Sendable {
  public enum Connection: Equatable, Sendable {
    /// A connected vhost-user socket, inherited.
    case descriptor(CInt)
    /// Where to listen; front ends are served one after another.
    case listen(String)
  }

  public enum Request: Equatable, Sendable { case serve, printCapabilities, printDescription, help }

  public var request = Request.serve
  public var connection: Connection?
  /// Receives `READY\n` once the sandbox is closed. Its presence says that a supervisor stands behind us.
  public var readyFD: CInt?
  /// Memory for statistics, a page for every queue, which whoever started us reads.
  public var statisticsFD: CInt?
  /// Who this process is, for example `vm/web1/disk0`.
  public var title: String?
  public var logLevel = Log.Level.warning
  /// How strictly the process walls itself in before it says READY.
  package var walls = WallMode.off
  private var values: [String: String] = [:]

  /// Another process may still be at work on what this one has been given; that is over when the front end speaks.
  public var isStandby = false

  /// Under a supervisor the rules are stricter: guest memory must be sealed.
  public var isSupervised: Bool { readyFD != nil }

  /// The value of a device option, when it was given.
  public func value(_ name: String) -> String? { values[name] }
  /// Whether a device switch was given.
  public func has(_ name: String) -> Bool { values[name] != nil }

  /// A device option that is a descriptor number.
  public func descriptor(_ name: String) throws(BackendError) -> CInt? {
    guard let text = values[name] else { return nil }
    return try Self.descriptorNumber(text, of: "--" + name)
  }

  /// A device option that is a whole number in `range`.
  public func number(_ name: String, in range: ClosedRange<Int>) throws(BackendError) -> Int? {
    guard let text = values[name] else { return nil }
    guard let number = Int(text), range.contains(number) else {
      throw .badOption("--" + name, why: "needs a number from \(range.lowerBound) to \(range.upperBound), not \(text)")
    }
    return number
  }

  static let common: [LaunchOption] = [
    .value("socket-path", "PATH", "listen on this Unix socket and serve front ends, one after another"),
    .value("fd", "NUMBER", "serve the front end at the other end of this inherited socket"),
    .value("ready-fd", "NUMBER", "write READY to this descriptor when the device can serve"),
    .value("stats-fd", "NUMBER", "keep statistics in this shared memory, a page for every queue"),
    .flag("standby", "what this process is given may be another's: leave it alone until the front end speaks"),
    .value("title", "TEXT", "who this process is, for logs and process lists"),
    .value("sandbox", "MODE", "on, off, or log: do what the walls forbid, and write it to the kernel's log (default: off, which is said)"),
    .value("log", "LEVEL", "error, warning, info or debug (default: warning)"),
    .flag("print-capabilities", "print what this program can do as JSON, and exit"),
    .flag("print-description", "print the description file that QEMU's conventions ask for as JSON, and exit"),
    .flag("help", "print this text, and exit"),
  ]

  /// Parses what follows the program's name; `--name=value` and `--name value` mean the same.
  /// - Parameter alternative: a device option that stands in for a connection to a front end.
  public static func parse(
    _ arguments: [String], options: [LaunchOption], alternative: String? = nil
  ) throws(BackendError) -> LaunchArguments {
    var result = LaunchArguments()
    let known = common + options
    var rest = arguments[...]
    while let word = rest.popFirst() {
      guard word.hasPrefix("--") else { throw .unknownOption(word, nearest: nil) }
      let parts = word.dropFirst(2).split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      let name = String(parts[0])
      guard let option = known.first(where: { $0.name == name }) else {
        throw .unknownOption("--" + name, nearest: nearest(to: name, among: known.map(\.name)).map { "--" + $0 })
      }
      var value = ""
      if option.argument != nil {
        if parts.count == 2 {
          value = String(parts[1])
        } else if let next = rest.popFirst() {
          value = next
        } else {
          throw .badOption("--" + name, why: "needs a value")
        }
        if value.isEmpty { throw .badOption("--" + name, why: "needs a value") }
      } else if parts.count == 2 {
        throw .badOption("--" + name, why: "takes no value")
      }
      try result.take(name, value)
    }
    let hasAlternative = alternative.map { result.has($0) } ?? false
    if result.request == .serve, (result.connection == nil) != hasAlternative { throw .noConnection }
    return result
  }

  private mutating func take(_ name: String, _ value: String) throws(BackendError) {
    switch name {
    case "help": request = .help
    case "print-capabilities": if request != .help { request = .printCapabilities }
    case "print-description": if request == .serve { request = .printDescription }
    case "socket-path", "fd":
      guard connection == nil else { throw .noConnection }
      connection = name == "fd" ? .descriptor(try Self.descriptorNumber(value, of: "--fd")) : .listen(value)
    case "ready-fd": readyFD = try Self.descriptorNumber(value, of: "--ready-fd")
    case "stats-fd": statisticsFD = try Self.descriptorNumber(value, of: "--stats-fd")
    case "title": title = value
    case "standby": isStandby = true
    case "sandbox":
      guard let mode = WallMode(rawValue: value) else { throw .badOption("--sandbox", why: "is on, off or log, not \(value)") }
      walls = mode
    case "log":
      switch value {
      case "error": logLevel = .error
      case "warning": logLevel = .warning
      case "info": logLevel = .info
      case "debug": logLevel = .debug
      default: throw .badOption("--log", why: "is error, warning, info or debug, not \(value)")
      }
    default:
      guard values.updateValue(value, forKey: name) == nil else { throw .badOption("--" + name, why: "was given twice") }
    }
  }

  private static func descriptorNumber(_ text: String, of option: String) throws(BackendError) -> CInt {
    guard let number = CInt(text), number >= 0, number < 1 << 20 else {
      throw .badOption(option, why: "needs a descriptor number, not \(text)")
    }
    return number
  }

  /// The known name with the fewest edits, when they are few enough to have been meant.
  static func nearest(to name: String, among known: [String]) -> String? {
    let ranked = known.map { (distance($0, name), $0) }.min { $0.0 < $1.0 }
    guard let (edits, best) = ranked, edits <= max(2, best.utf8.count / 3) else { return nil }
    return best
  }

  private static func distance(_ a: String, _ b: String) -> Int {
    // The words come from our own command line; a cap keeps absurd ones cheap.
    let left = Array(a.utf8.prefix(64))
    let right = Array(b.utf8.prefix(64))
    var row = Array(0...right.count)
    for (i, x) in left.enumerated() {
      var diagonal = row[0]
      row[0] = i + 1
      for (j, y) in right.enumerated() {
        let above = row[j + 1]
        row[j + 1] = min(above + 1, row[j] + 1, diagonal + (x == y ? 0 : 1))
        diagonal = above
      }
    }
    return row[right.count]
  }
}
