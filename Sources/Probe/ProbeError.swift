import HostSystem
import VMMemory
import VhostUser
import VirtioQueue

/// Why a verb could not run (exit code 2).
package enum ProbeError: Error, Sendable, CustomStringConvertible {
  /// A verb that does not exist.
  case unknownVerb(String, nearest: String?)
  /// An option the verb does not have.
  case unknownOption(String, verb: String, nearest: String?)
  /// An option with a value it cannot have; `why` is what it wants.
  case badOption(String, why: String)
  /// No back end was named, or more than one.
  case noTarget(String)
  /// The program named after `--` cannot be started.
  case cannotStart(String, Errno)
  /// The back end ended before it could be reached; its last words.
  case ended(String, lastWords: String)
  /// Nobody can be reached there.
  case unreachable(String, why: String)
  /// The peer does not behave as a vhost-user back end.
  case notVhostUser(String)
  /// The back end lacks what the verb needs, or is too small for it.
  case unsuitable(String)
  case protocolError(String, VhostUserError)
  case system(SystemError)
  case memory(MemoryError)
  case queue(VirtqueueError)

  package var description: String {
    switch self {
    case .unknownVerb(let name, let nearest):
      "Unknown verb '\(name)'; \(nearest.map { "did you mean \($0)?" } ?? "martlet probe --help lists the verbs")"
    case .unknownOption(let name, let verb, let nearest):
      "Unknown option \(name) of \(verb); \(nearest.map { "did you mean --\($0)?" } ?? "martlet probe \(verb) --help lists them")"
    case .badOption(let name, let why): "Option --\(name) \(why)"
    case .noTarget(let why): why
    case .cannotStart(let program, let errno): "Cannot start \(program): \(errno.explanation)"
    case .ended(let what, let words): "The back end \(what)" + (words.isEmpty ? "" : "; it said: \(words)")
    case .unreachable(let path, let why): "No back end can be reached at \(path): \(why)"
    case .notVhostUser(let why): "The peer is no vhost-user back end: \(why)"
    case .unsuitable(let why): why
    case .protocolError(let doing, let error): "Cannot \(doing): \(error)"
    case .system(let error): "\(error)"
    case .memory(let error): "\(error)"
    case .queue(let error): "\(error)"
    }
  }
}

/// Runs a call of another module with its error wrapped.
func wrapping<T: ~Copyable>(_ body: () throws(SystemError) -> T) throws(ProbeError) -> T {
  do throws(SystemError) { return try body() } catch { throw .system(error) }
}

func wrapping<T: ~Copyable>(_ body: () throws(MemoryError) -> T) throws(ProbeError) -> T {
  do throws(MemoryError) { return try body() } catch { throw .memory(error) }
}

func wrapping<T: ~Copyable>(_ body: () throws(VirtqueueError) -> T) throws(ProbeError) -> T {
  do throws(VirtqueueError) { return try body() } catch { throw .queue(error) }
}
