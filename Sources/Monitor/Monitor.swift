// Monitor: the core process. Builds a VM from messages and descriptors of the supervisor, runs its event loop, and answers
// for it. It opens no path and connects no socket: all it uses comes over the control channel.
//
// One thread owns the loop and everything registered in it; the processors' threads leave events in the machine and wake
// the loop. Nothing here waits for a back end: its session is a state machine with deadlines.

import CLinux
import HostSystem
import Sandbox

/// The core program.
package enum CoreProgram {
  /// Runs to the end; returns the exit code: 0 the VM ended in order, 1 it could not be built or its channel broke,
  /// 2 wrong arguments.
  package static func run(_ arguments: [String]) -> Int32 {
    let parsed: CoreArguments
    switch CoreArguments.parse(arguments.dropFirst()) {
    case .success(let value): parsed = value
    case .failure(let error):
      Log.error(error.description)
      return 2
    }
    // The processors' threads allocate during set-up and next to never afterwards; a heap each would cost memory and
    // system calls for every processor.
    clinux_use_one_heap()
    do {
      let socket = try OwnedFD.inherited(parsed.channel)
      try ProcessWalls.raise(title: parsed.title)
      try ProcessWalls.closeFiles(parsed.walls)
      Signals.ignoreBrokenPipes()
      try WaitBreaker.protectThisThread()
      return try serve(socket, walls: parsed.walls)
    } catch let error as SandboxError {
      Log.error(error.message)
    } catch let error as SystemError {
      Log.error(error.description)
    } catch {
      Log.error("Core cannot start")
    }
    return 1
  }

  /// Serves one supervisor on the calling thread until the VM has ended; returns the exit code.
  package static func serve(_ channel: consuming OwnedFD, walls: WallMode = .off) throws(SystemError) -> Int32 {
    try Core(channel, walls).run()
  }
}

/// What the core is started with (`protocol/launch.md`).
package struct CoreArguments: Equatable, Sendable {
  package struct Mistake: Error, CustomStringConvertible {
    package let description: String
  }

  package var channel: Int32 = -1
  package var title: String?
  /// How strictly it walls itself in once the machine exists.
  package var walls = WallMode.off

  package init(channel: Int32 = -1, title: String? = nil) {
    self.channel = channel
    self.title = title
  }

  package static func parse(_ arguments: ArraySlice<String>) -> Result<CoreArguments, Mistake> {
    var result = CoreArguments()
    for argument in arguments {
      if let text = argument.value(of: "--fd") {
        guard let number = Int32(text), number >= 0 else {
          return .failure(Mistake(description: "--fd=\(text) is no descriptor number; the supervisor starts this program"))
        }
        result.channel = number
      } else if let text = argument.value(of: "--sandbox") {
        guard let mode = WallMode(rawValue: text) else {
          return .failure(Mistake(description: "--sandbox=\(text) is not on, off or log"))
        }
        result.walls = mode
      } else if let text = argument.value(of: "--title") {
        result.title = text
      } else {
        return .failure(
          Mistake(description: "Unknown argument \(argument); the core is started by martlet-supervisor, with --fd=N"))
      }
    }
    guard result.channel >= 0 else {
      return .failure(Mistake(description: "--fd is missing; the core is started by martlet-supervisor, with --fd=N"))
    }
    return .success(result)
  }
}

extension String {
  fileprivate func value(of name: String) -> String? {
    utf8.starts(with: (name + "=").utf8) ? String(self.dropFirst(name.utf8.count + 1)) : nil
  }
}
