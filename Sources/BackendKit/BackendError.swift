import HostSystem

/// Why a back-end program cannot start or a connection cannot go on.
public enum BackendError: Error, Sendable, CustomStringConvertible {
  /// An option that does not exist; the nearest one that does.
  case unknownOption(String, nearest: String?)
  /// An option without the value it needs, or with one it does not take.
  case badOption(String, why: String)
  /// Neither or both of `--fd` and `--socket-path` were given.
  case noConnection
  /// What the device needs to start is missing or unusable.
  case device(String)
  case system(SystemError)

  /// Any error as one of these.
  public init(_ error: any Error) {
    switch error {
    case let error as BackendError: self = error
    case let error as SystemError: self = .system(error)
    default: self = .device("\(error)")
    }
  }

  /// Whether other options would help.
  var isAboutTheCommandLine: Bool {
    switch self {
    case .unknownOption, .badOption, .noConnection: true
    case .device, .system: false
    }
  }

  public var description: String {
    switch self {
    case .unknownOption(let option, let nearest):
      "Unknown option \(option)" + (nearest.map { "; did you mean \($0)?" } ?? "; see --help")
    case .badOption(let option, let why): "Option \(option) \(why)"
    case .noConnection: "Exactly one of --socket-path=PATH and --fd=NUMBER is needed"
    case .device(let why): why
    case .system(let error): error.description
    }
  }
}
