import HostSystem
import TestSupport
import Testing
import VhostUser

@Suite struct ConnectionTests {
  private func ends(_ expectation: Connection.Expectation = .frontEndRequests) throws -> Ends {
    let pair = try UnixSocket.pair(.stream)
    return Ends(receiver: Connection(pair.first, expecting: expectation, descriptorLimit: 4), sender: pair.second)
  }

  private struct Ends: ~Copyable {
    var receiver: Connection
    let sender: OwnedFD
    var now = MonotonicTime(nanoseconds: 5_000_000_000)

    func send(_ bytes: [UInt8], _ descriptors: [CInt] = []) {
      #expect(UnixSocket.send(sender, bytes, descriptors: descriptors) == .bytes(bytes.count))
    }

    /// What receiving came to, in words that can be compared.
    mutating func receive() -> String {
      do throws(VhostUserError) {
        guard let message = try receiver.receive(now: now) else { return "nothing" }
        return "\(message.header.request) \(message.payload.count) bytes \(message.descriptors.count) fds"
      } catch { return "\(error)" }
    }
  }

  @Test func aMessageInSingleBytesArrivesOnceAndWhole() throws {
    var ends = try ends()
    let message = FrontEndMessage.setVringNum(VringState(index: 1, number: 256))
    let bytes = message.header().encoded + message.payload
    for byte in bytes.dropLast() {
      ends.send([byte])
      let outcome = ends.receive()
      #expect(outcome == "nothing")
    }
    ends.send([bytes[bytes.count - 1]])
    let whole = ends.receive()
    let after = ends.receive()
    #expect(whole == "8 8 bytes 0 fds")
    #expect(after == "nothing")
  }

  @Test func messagesSentTogetherComeOneByOneWithTheirOwnDescriptors() throws {
    var ends = try ends()
    let event = try EventFD()
    let kick = FrontEndMessage.setVringKick(VringEvent(index: 0, carriesDescriptor: true))
    ends.send(FrontEndMessage.getFeatures.header().encoded + FrontEndMessage.setOwner.header().encoded)
    ends.send(kick.header().encoded + kick.payload, [event.fd.rawValue])
    ends.send(FrontEndMessage.getFeatures.header().encoded)
    let outcomes = [ends.receive(), ends.receive(), ends.receive(), ends.receive(), ends.receive()]
    #expect(outcomes == ["1 0 bytes 0 fds", "3 0 bytes 0 fds", "12 8 bytes 1 fds", "1 0 bytes 0 fds", "nothing"])
  }

  @Test func descriptorsAfterTheFirstByteAreRefusedAndClosed() throws {
    var ends = try ends()
    let name = "late-fds"
    let object = try memoryObject(name)
    let kick = FrontEndMessage.setVringKick(VringEvent(index: 0, carriesDescriptor: true))
    let bytes = kick.header().encoded + kick.payload
    ends.send(Array(bytes[..<5]))
    _ = ends.receive()
    ends.send(Array(bytes[5...]), [object.rawValue])
    let outcome = ends.receive()
    #expect(outcome == VhostUserError.strayDescriptors.description)
    #expect(openDescriptors(of: name) == 1)
  }

  @Test(arguments: [5, 8, 100, 253])
  func moreDescriptorsThanTheLimitEndTheConnectionAndNoneStaysOpen(count: Int) throws {
    var ends = try ends()
    let name = "flood-\(count)"
    let object = try memoryObject(name)
    ends.send(FrontEndMessage.setOwner.header().encoded, Array(repeating: object.rawValue, count: count))
    let outcome = ends.receive()
    #expect(outcome == VhostUserError.strayDescriptors.description)
    let again = ends.receive()
    #expect(again == outcome)
    #expect(openDescriptors(of: name) == 1)
  }

  @Test func aLargeAnnouncementIsRefusedBeforeItsPayloadIsRead() throws {
    var ends = try ends()
    ends.send(MessageHeader(request: 2, flags: .version1, size: 4097).encoded)
    let outcome = ends.receive()
    #expect(outcome == VhostUserError.payloadTooLarge(request: 2, size: 4097).description)
  }

  @Test func aSizeTheRequestDoesNotHaveIsRefusedBeforeItsPayloadIsRead() throws {
    var ends = try ends()
    ends.send(MessageHeader(request: 8, flags: .version1, size: 16).encoded)
    let outcome = ends.receive()
    #expect(outcome == VhostUserError.wrongSize(of: "payload of SET_VRING_NUM", expected: 8, actual: 16).description)
  }

  @Test func aMessageMustBeWholeASecondAfterItsFirstByte() throws {
    var ends = try ends()
    let start = ends.now
    #expect(ends.receiver.deadline == nil)
    ends.send([2, 0])
    _ = ends.receive()
    let deadline = ends.receiver.deadline
    #expect(deadline == start.advanced(by: .seconds(1)))
    // Further bytes do not move it.
    ends.now = start.advanced(by: .milliseconds(900))
    ends.send([0])
    let early = ends.receive()
    #expect(early == "nothing")
    ends.now = start.advanced(by: .seconds(1))
    ends.send([0])
    let late = ends.receive()
    #expect(late == VhostUserError.incompleteMessage.description)
  }

  @Test func leavingBetweenMessagesAndInTheMiddleAreToldApart() throws {
    var between = try UnixSocket.pair(.stream).split { first, second in
      _ = consume second
      return Connection(first, expecting: .frontEndRequests, descriptorLimit: 4)
    }
    #expect(throws: VhostUserError.closed(midMessage: false)) { _ = try between.receive(now: .now) == nil }
    var middle = try UnixSocket.pair(.stream).split { first, second in
      _ = UnixSocket.send(second, [1, 0, 0])
      return Connection(first, expecting: .frontEndRequests, descriptorLimit: 4)
    }
    #expect(throws: VhostUserError.closed(midMessage: true)) { _ = try middle.receive(now: .now) == nil }
  }

  @Test func aPeerThatDoesNotReadIsGivenUpInsteadOfWaitedFor() throws {
    let pair = try UnixSocket.pair(.stream)
    var sender = Connection(pair.first, expecting: .nothing, descriptorLimit: 1)
    let reader = pair.second
    let payload = [UInt8](repeating: 0, count: 4096)
    var failure: VhostUserError?
    for _ in 0..<10_000 {
      do throws(VhostUserError) {
        try sender.send(MessageHeader(request: 26, flags: .version1, size: 4096), payload)
      } catch {
        failure = error
        break
      }
    }
    #expect(failure == .peerDoesNotRead)
    _ = consume reader
  }

  @Test func aReplyMustAnswerTheOutstandingRequest() throws {
    var ends = try ends(.reply(to: 1))
    ends.send(Reply.number(0).header(to: 15).encoded)
    let outcome = ends.receive()
    #expect(outcome == VhostUserError.unexpectedReply(to: 15, awaiting: 1).description)
    var silent = try self.ends(.nothing)
    silent.send(Reply.number(0).header(to: 1).encoded)
    let unasked = silent.receive()
    #expect(unasked == VhostUserError.unsolicited(request: 1).description)
  }
}
