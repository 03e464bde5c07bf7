import HostSystem
import Sandbox

/// Why a program could not be started in a jail. Nothing has been started then. Each case has one line (`message`) with
/// the thing and the remedy.
package enum JailError: Error, Sendable {
  /// The profile cannot be read.
  case profile(path: String, Errno)
  /// A line of the profile that means nothing, or something impossible.
  case line(file: String, line: Int, problem: String)
  /// The profile as a whole: something that only shows when all of it is known.
  case contradiction(file: String, problem: String)
  /// The program does not exist or may not be executed.
  case program(path: String, Errno)
  /// It is there and cannot be run in a jail.
  case unsuitable(path: String, problem: String)
  /// A place of the profile is not there on this host.
  case place(path: String, file: String, problem: String)
  /// The jail hides what the program cannot start without.
  case hidden(needed: String, program: String, line: String, file: String)
  /// The host cannot build these walls.
  case host(String)
  /// A step between fork and exec failed.
  case step(Stage, Errno, place: String?)

  /// As `timeout` and `env` count: 125 the jail itself, 126 the program cannot be run, 127 there is no such program.
  package var exitCode: Int32 {
    switch self {
    case .program(_, .noEntry): 127
    case .program, .unsuitable: 126
    case .step(.exec, .noEntry, _): 127
    case .step(.exec, _, _): 126
    default: 125
    }
  }

  package var message: String {
    switch self {
    case .profile(let path, let errno): "Cannot read the profile '\(path)': \(errno.explanation); check the path"
    case .line(let file, let line, let problem): "Profile '\(file)', line \(line): \(problem)"
    case .contradiction(let file, let problem): "Profile '\(file)': \(problem)"
    case .program(let path, .noEntry): "There is no program '\(path)'; check its path"
    case .program(let path, let errno): "Cannot run '\(path)': \(errno.explanation)"
    case .unsuitable(let path, let problem): "Cannot run '\(path)' in a jail: \(problem)"
    case .place(let path, let file, let problem): "Profile '\(file)' wants '\(path)' to be seen: \(problem)"
    case .hidden(let needed, let program, let line, let file):
      "The jail hides '\(needed)', which \(program) cannot start without; add the line '\(line)' to '\(file)', or let --learn do it"
    case .host(let sentence): sentence
    case .step(let stage, let errno, let place):
      if let place {
        "Cannot \(stage.action) of the jailed program: '\(place)': \(errno.explanation)\(Self.hint(stage, errno))"
      } else {
        "Cannot \(stage.action) of the jailed program: \(errno.explanation)\(stage.remedy)"
      }
    }
  }

  private static func hint(_ stage: Stage, _ errno: Errno) -> String {
    switch (stage, errno) {
    case (.directory, .invalid):
      "; its file system cannot show it as another user's, or part of it is mounted over: give it to the program's user, or "
        + "write 'user keep' into the profile"
    case (.directory, .notPermitted), (.directory, .accessDenied): "; the container around Martlet must allow mount, or start as root"
    case (.limits, _): "; choose a limit below the present one"
    default: ""
    }
  }
}
