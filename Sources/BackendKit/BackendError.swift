import HostSystem
import VMMemory

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
  /// The front end asked for something it may not; the connection is closed.
  case frontEnd(String)
  /// The memory the front end passed cannot be used.
  case memory(MemoryError)
  /// A ring does not lie in guest memory as it must, or is of an impossible size.
  case ring(index: Int, why: String)
  case system(SystemError)

  /// Whether other options would help.
  var isAboutTheCommandLine: Bool {
    switch self {
    case .unknownOption, .badOption, .noConnection: true
    case .device, .frontEnd, .memory, .ring, .system: false
    }
  }

  public var description: String {
    switch self {
    case .unknownOption(let option, let nearest):
      "Unknown option \(option)" + (nearest.map { "; did you mean \($0)?" } ?? "; see --help")
    case .badOption(let option, let why): "Option \(option) \(why)"
    case .noConnection: "Exactly one of --socket-path=PATH and --fd=NUMBER is needed"
    case .device(let why): why
    case .frontEnd(let why): "The front end broke the protocol: \(why)"
    case .memory(let error): "The front end's memory cannot be used: \(error)"
    case .ring(let index, let why): "Ring \(index) cannot be used: \(why)"
    case .system(let error): error.description
    }
  }
}
