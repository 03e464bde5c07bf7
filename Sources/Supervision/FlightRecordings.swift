import ControlProtocol
import Glibc
import HostSystem

/// What was said to and by a back end before it was lost: kept for `martlet ctl conversation`, and written to a file where
/// `--flight-recorder` says so.
extension Supervisor {
  /// Files of one device; then the oldest is written over.
  static let recordingLimit = 16

  func keepConversation(_ id: String, _ text: String) {
    guard assignments.contains(where: { $0.id == id }) else { return }
    conversations[id] = text
    guard configuration.flightRecorder != nil else { return }
    let number = recordingCounts[id, default: 0]
    recordingCounts[id] = number + 1
    let name = "\(configuration.name)-\(id)-\(number % Self.recordingLimit).rec"
    do throws(SupervisionError) {
      // The spawner takes ids and numbers, and no names.
      let file: FDBox
      if let spawner {
        file = try spawner.recording(id, number % Self.recordingLimit)
      } else {
        file = FDBox(try recordingFile(id, number % Self.recordingLimit))
      }
      guard file.write(Array(text.utf8)) else { throw .launch("it cannot be written") }
      say(.info, "What was said to the lost back end of \(id) is in '\(name)'")
    } catch { say(.warning, "The recording '\(name)' is lost: \(error.message ?? "it failed")") }
  }

  /// The file for a recording, emptied.
  func recordingFile(_ id: String, _ number: Int) throws(SupervisionError) -> OwnedFD {
    guard let directory = configuration.flightRecorder, cares[id] != nil, (0..<Self.recordingLimit).contains(number) else {
      throw .launch("There is no recording of '\(id)'")
    }
    let path = "\(directory)/\(configuration.name)-\(id)-\(number).rec"
    do { return try OwnedFD.openNamed(path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK | O_NOCTTY | noFollow, mode: 0o600) } catch {
      throw .file(what: "recording", path: path, error.errno)
    }
  }

  /// `martlet ctl conversation`: what to ask the core; nil when the client has been refused.
  func askConversation(_ id: String, for client: Int) -> SupervisorMessage? {
    guard assignments.contains(where: { $0.id == id }) else {
      refuse(client, "There is no device '\(id)'")
      return nil
    }
    guard phase == .running else {
      refuse(client, phase == .starting ? "The VM is still starting; ask again" : "The VM is ending")
      return nil
    }
    return .conversation(id: id)
  }

  func tell(_ conversation: String, to client: Int) {
    reply(client, .record(["ok": .bool(true), "conversation": .string(conversation)]))
  }
}
